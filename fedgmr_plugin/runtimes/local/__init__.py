"""What FedML's MQTT and S3 runtimes talk to, on this machine and for this user alone: no cloud, no Docker.

module     content
---------  --------------------------------------------------------------------------------------
stack      both services and whatever is started beside them, as one context manager
broker     a private Mosquitto
storage    a private S3 endpoint: moto, with credentials that it checks
processes  named child processes that never outlive their supervisor, and restarts of them
record     the processes of a folder, written down so that another process can stop them
keeper     the process that ends them where the supervisor was killed
groups     process groups: who leads one, and how it is ended
ports      free ports of the loopback interface
mqtt       one MQTT handshake, to know that a broker answers
"""
