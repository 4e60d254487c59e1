"""voxloss in other libraries; each imports its library, and nothing here is imported by `import voxloss`."""
