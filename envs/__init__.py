"""The accept/reject task as Gymnasium environments."""
