"Rows, claims and their merging."
