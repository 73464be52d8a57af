"""Answers to the exercise of 15_tokenizer, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def joined(pieces):
    spelled = b""
    for piece in pieces:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        spelled += bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return spelled.decode()

# %% right: by length
def joined(pieces):
    parts = [bytes.fromhex(piece[3:5]) if len(piece) == 6 and piece[:3] == "<0x" else piece.encode() for piece in pieces]
    return b"".join(parts).decode().replace("▁", " ")

# %% wrong: each byte is a character
def joined(pieces):
    return "".join(chr(int(piece[3:5], 16)) if piece.startswith("<0x") else piece.replace("▁", " ") for piece in pieces)

# %% wrong: each byte is decoded alone
def joined(pieces):
    return "".join(bytes.fromhex(piece[3:5]).decode(errors="replace") if piece.startswith("<0x") else piece.replace("▁", " ") for piece in pieces)

# %% wrong: bytes stay as they are spelled
def joined(pieces):
    return "".join(pieces).replace("▁", " ")

# %% wrong: no space at the beginning
def joined(pieces):
    parts = [bytes.fromhex(piece[3:5]) if len(piece) == 6 and piece[:3] == "<0x" else piece.encode() for piece in pieces]
    return b"".join(parts).decode().replace("▁", " ").lstrip()

# %% wrong: whatever looks like a byte in the text is one
def joined(pieces):
    found = re.sub("<0x([0-9A-F]*)>", lambda byte: bytes.fromhex(byte[1]).decode("latin-1"), "".join(pieces).replace("▁", " "))
    return found.encode("latin-1").decode()
