"""Annotations in the forms that other tools write and read: COCO, YOLO, CVAT, Label Studio, and the two-box CSV."""
