"""Where fedgmr meets FedML: the only package that imports it.

host            what must be repaired before FedML can be imported, and its cloud kept out
config_file     FedML's YAML, checked before FedML reads it
registration    `federated_optimizer: fedgmr`, dispatched from FedML's own constructors
setup           FedML's objects, made into what every process of a run needs
run             one run: its log, checkpoints, progress and model
single_process  FedML's single-process simulator
distributed     clients trained by several processes: forks, MPI, torch.distributed
"""
