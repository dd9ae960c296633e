"""Any data set as WebDataset shards: the command (command), one image (image), the state on the disk (folder)."""
