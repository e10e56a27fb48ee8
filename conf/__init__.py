"""What a run is: its typed schema, its config groups, and the way from one to the other."""
