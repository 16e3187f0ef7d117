"""Starting a workflow elsewhere: under Dragon, on the nodes of an allocation, in an image."""
