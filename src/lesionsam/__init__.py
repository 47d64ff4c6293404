"""LesionSAM: two boxes per lesion in, a Segment Anything model that segments the domain out."""

__version__ = "0.1.0"
