"""Clients of one run trained by several processes: of this machine, of a cluster, one per GPU.

module     content
---------  --------------------------------------------------------------------------------------
tasks      which dispatch is trained next, and by whom: longest first
payloads   what of a sub-model must travel to a process that has parts of it
channel    heads and values of the messages between the server's process and the others
pool       the server's side: an `Executor` over channels to other processes
worker     the other side: trains what comes
forks      channels to forks of this process, through pipes
mpi        channels to ranks of an MPI communicator
collective channels to ranks of torch.distributed: gloo, and NCCL between GPUs
ranks      FedML's multi-process simulators, on the last two
fedml_nccl what FedML's wheel lacks for one of them
job        this process's rank, as its launcher says, and how a job ends
"""
