"""FedGMR as a deterministic state machine, and the virtual world that it is simulated in. No I/O."""
