"""Files and bytes: where they are, how parts of them are read and fetched, how they are exchanged whole. Nothing here knows a model."""
