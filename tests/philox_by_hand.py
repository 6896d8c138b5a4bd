"""Philox4x32-10 on Python integers, written from the paper and sharing no code with fastgen."""


def philox4x32_10(counter, key):
    """Salmon et al. 2011, section 3.3: the S-P network of figure 3, four words, ten rounds."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for bump in range(10):
        keys = [(key[0] + bump * 0x9E3779B9) % 2**32, (key[1] + bump * 0xBB67AE85) % 2**32]
        high0, low0 = divmod(left[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(left[1] * 0xCD9E8D57, 2**32)
        left = [high1 ^ right[0] ^ keys[0], high0 ^ right[1] ^ keys[1]]
        right = [low1, low0]
    return [left[0], right[0], left[1], right[1]]


def words(seed, offset, count):
    """The stream of fastgen.random, word by word."""
    result = []
    for block in range((count + 3) // 4):
        counter = (offset + block) % 2**64
        result += philox4x32_10(
            [counter % 2**32, counter // 2**32, 0, 0], [seed % 2**32, seed % 2**64 // 2**32]
        )
    return result[:count]


#: The published vectors of Random123, file tests/kat_vectors, lines "philox4x32 10":
#: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
