"""FedGMR on real devices: FedML's cross-device runtime, MQTT and an object store."""
