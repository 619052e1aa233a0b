"""Models that CrevNet is compared with: published architectures, each with a configuration. All of them can be trained."""
