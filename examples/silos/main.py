"""Federated learning between silos: the server and every silo run this script."""

import fedgmr_plugin
from fedgmr_plugin.datasets import DigitsCNN, digits


def load(args):
    """FedML's list of eight: the server needs its own test data, a silo its own training data.

    This example makes everybody's data everywhere. With data of your own, the dictionaries of a silo have the
    entry RANK - 1 alone.
    """
    return digits(clients=args.client_num_in_total, seed=args.random_seed)


if __name__ == "__main__":
    # Teaches FedML `federated_optimizer: "fedgmr"`, and keeps it from asking its cloud.
    fedgmr_plugin.register()

    import fedml
    from fedml import FedMLRunner

    args = fedml.init(check_env=False)
    device = fedml.device.get_device(args)
    FedMLRunner(args, device, load(args), DigitsCNN()).run()
