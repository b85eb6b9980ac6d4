"""Scene and model to a georeferenced file, in bounded memory."""
