"""The containers, their element types and block codecs: pure functions over bytes."""
