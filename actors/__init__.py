"""What runs on a node of the cluster: replicas of the model, corpus readers, the store of artifacts."""
