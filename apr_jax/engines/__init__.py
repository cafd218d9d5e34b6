"""Other engines: which of their modules is what, what their calls show, and the forms in which they leave dumps."""
