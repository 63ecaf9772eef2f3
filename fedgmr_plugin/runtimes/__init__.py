"""Where fedgmr meets FedML: the only package that imports it.

host            what must be repaired before FedML can be imported, and its cloud kept out
config_file     FedML's YAML, checked before FedML reads it
registration    `federated_optimizer: fedgmr`, dispatched from FedML's own constructors
single_process  the method under FedML's single-process simulator
"""
