"""Starting a workflow elsewhere: in an image, under Dragon, on the nodes of an allocation."""
