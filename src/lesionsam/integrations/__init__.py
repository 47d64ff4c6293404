"""Other annotation tools call the model: CVAT's auto-annotation, Label Studio's ML backend."""
