"""FedGMR between organisations: FedML's cross-silo runtime, over MQTT and S3 or over gRPC."""
