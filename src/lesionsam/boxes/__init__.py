"""The two boxes of a lesion: geometry, the box CSV, the simulated annotator and the box prior."""
