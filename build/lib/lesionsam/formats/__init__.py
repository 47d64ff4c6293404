"""Annotations of other tools: COCO, YOLO, CVAT, Label Studio, and the two-box CSV."""
