"""Decode images and recordings, and choose their segments, in the model host only.

The bytes come from users. `kinds` looks at them before any decoder is opened, and only decoders of its list are.
Every value ends as segments or as InputRejected. Nothing is written to disk, no address is fetched, and no process is
started.
"""
