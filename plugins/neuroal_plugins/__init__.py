"""The plugins that come with neuroal, one file each, in a folder for each role."""
