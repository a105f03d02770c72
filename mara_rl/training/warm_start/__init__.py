"""The warm start: credit, values, distillation."""
