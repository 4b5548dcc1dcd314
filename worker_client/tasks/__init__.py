"""Tasks that come with fedmq. One file each; they use nothing but the public API."""
