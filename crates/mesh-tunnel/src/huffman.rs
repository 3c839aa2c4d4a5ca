//! The Huffman code of HPACK. Source: RFC 7541 §5.2 and appendix B.
//!
//! The code is canonical: codes of one length ascend with the symbol, so the lengths alone define it.

/// Code length of each byte, bits. The end-of-string symbol, the 257th, has 30.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];

const MIN_BITS: usize = 5;
const MAX_BITS: usize = 30;

/// For each length: the first code, and where its symbols start in `SYMBOLS`.
struct Canonical {
    first_code: [u32; MAX_BITS + 2],
    first_symbol: [u16; MAX_BITS + 2],
    symbols: [u8; 256],
}

const CANONICAL: Canonical = canonical();

const fn canonical() -> Canonical {
    let mut table = Canonical {
        first_code: [0; MAX_BITS + 2],
        first_symbol: [0; MAX_BITS + 2],
        symbols: [0; 256],
    };
    let (mut bits, mut code, mut place) = (1, 0u32, 0u16);
    while bits <= MAX_BITS {
        code <<= 1;
        table.first_code[bits] = code;
        table.first_symbol[bits] = place;
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == bits {
                // Below 256: its lowest byte is all of it.
                table.symbols[place as usize] = symbol.to_le_bytes()[0];
                place += 1;
                code += 1;
            }
            symbol += 1;
        }
        bits += 1;
    }
    table.first_symbol[MAX_BITS + 1] = place;
    table
}

/// Not the Huffman code of any string, or longer than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidHuffman;

/// Appends the decoded bytes of `input` to `out`, which may not grow by more than `limit` bytes.
pub(crate) fn decode(input: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), InvalidHuffman> {
    let end = out.len() + limit;
    // The next bits are the top `have` bits of `window`.
    let (mut window, mut have) = (0u64, 0usize);
    let mut input = input.iter();
    loop {
        while have <= 56 {
            let Some(byte) = input.next() else { break };
            window |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let Some((symbol, bits)) = first_symbol(window, have) else { break };
        if out.len() == end {
            return Err(InvalidHuffman);
        }
        out.push(symbol);
        window <<= bits;
        have -= bits;
    }
    // What is left must be less than a byte of padding: the start of the end-of-string code, all ones.
    if have >= 8 || (have > 0 && window >> (64 - have) != (1 << have) - 1) {
        return Err(InvalidHuffman);
    }
    Ok(())
}

/// The symbol whose code the window starts with, if all of it is there. Never the end-of-string symbol.
fn first_symbol(window: u64, have: usize) -> Option<(u8, usize)> {
    for bits in MIN_BITS..=MAX_BITS.min(have) {
        let code = u32::try_from(window >> (64 - bits)).ok()?;
        let count = CANONICAL.first_symbol[bits + 1] - CANONICAL.first_symbol[bits];
        let offset = code.wrapping_sub(CANONICAL.first_code[bits]);
        if offset < u32::from(count) {
            let place = usize::from(CANONICAL.first_symbol[bits]) + offset as usize;
            return Some((CANONICAL.symbols[place], bits));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(text: &[u8]) -> Vec<u8> {
        let mut bits = String::new();
        for byte in text {
            let length = usize::from(LENGTHS[usize::from(*byte)]);
            let first = usize::from(CANONICAL.first_symbol[length]);
            let rank = CANONICAL.symbols[first..].iter().position(|s| s == byte).unwrap();
            let code = CANONICAL.first_code[length] as usize + rank;
            bits.push_str(&format!("{code:0length$b}"));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        bits.as_bytes()
            .chunks(8)
            .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap())
            .collect()
    }

    #[test]
    fn the_rfc_examples_decode() {
        // RFC 7541 C.4.1, C.4.2, C.6.1.
        for (code, text) in [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ] {
            let code: Vec<u8> = (0..code.len())
                .step_by(2)
                .map(|i| u8::from_str_radix(&code[i..i + 2], 16).unwrap())
                .collect();
            let mut out = Vec::new();
            assert_eq!(decode(&code, 100, &mut out), Ok(()));
            assert_eq!(String::from_utf8(out).unwrap(), text);
            assert_eq!(encode(text.as_bytes()), code);
        }
    }

    #[test]
    fn every_byte_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        let mut out = Vec::new();
        assert_eq!(decode(&encode(&all), 256, &mut out), Ok(()));
        assert_eq!(out, all);
        assert_eq!(decode(&encode(&all), 255, &mut Vec::new()), Err(InvalidHuffman));
    }

    #[test]
    fn wrong_padding_and_the_end_symbol_are_refused() {
        for code in
            [&[0x00][..], &[0xff], &[0xff, 0xff, 0xff, 0xff], &[0b0001_1111, 0xff], &[0b0001_1000]]
        {
            // 0x00 is "0" (5 bits) and three bits of padding that are not ones.
            assert_eq!(decode(code, 100, &mut Vec::new()), Err(InvalidHuffman), "{code:x?}");
        }
        assert_eq!(decode(&[0b0000_0111], 100, &mut Vec::new()), Ok(()));
    }
}
