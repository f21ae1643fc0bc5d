"""Transforms: layers that are stored together. The contract is `kvstack.stage.Transform`."""
