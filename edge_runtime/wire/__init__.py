"""How an adapter travels: messages, codecs, blobs, transports."""
