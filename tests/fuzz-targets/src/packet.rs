//! The guard's packet parser, as the eBPF program runs it.

use mesh_ebpf_abi::{Fetch, Packet, Transport, parse_packet};

use crate::input::Input;

struct Slice<'a>(&'a [u8]);

impl Fetch for Slice<'_> {
    fn fetch<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let from = usize::try_from(offset).ok()?;
        self.0.get(from..)?.first_chunk().copied()
    }
}

/// What passes has its addresses and ports where a receiver reads them, and depends on no byte behind the packet's end.
pub fn packet(data: &[u8]) {
    let mut input = Input::new(data);
    let ethertype = input.u16();
    let tagged = input.byte() == 1;
    let bytes = input.rest();
    let mut found = Packet::ARP;
    if parse_packet(&Slice(bytes), ethertype, tagged, &mut found).is_err() {
        return;
    }
    assert!(!tagged, "a VLAN tag passed");
    let (source_at, address_len, header) = match ethertype {
        0x0806 => return assert_eq!(found.transport, Transport::Arp),
        0x0800 => (12, 4, usize::from(bytes[0] & 0x0f) * 4),
        0x86dd => (8, 16, if bytes[6] == 6 { 40 } else { 48 }),
        other => panic!("{other:04x} passed"),
    };
    let addresses = [found.source, found.target];
    for (index, address) in addresses.into_iter().enumerate() {
        let at = source_at + index * address_len;
        let octets = address.octets();
        assert_eq!(&octets[16 - address_len..], &bytes[at..at + address_len]);
    }
    if found.transport == Transport::Tcp {
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        assert_eq!(found.source_port.get(), port(header));
        assert_eq!(found.target_port.get(), port(header + 2));
        assert_eq!(found.flags.0, bytes[header + 13]);
    }
}

pub(crate) fn packet_seeds() -> Vec<Vec<u8>> {
    let tcp: Vec<u8> =
        [&[0x1f, 0x90, 0, 80][..], &[0; 8], &[0x50, 2, 0xff, 0xff, 0, 0, 0, 0]].concat();
    let v4 = |protocol: u8, payload: &[u8]| {
        let mut packet =
            vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet[3] += u8::try_from(payload.len()).expect("a seed is short");
        packet.extend(payload);
        [&[8, 0, 0][..], &packet].concat()
    };
    let v6 = |next: u8, payload: &[u8]| {
        let mut packet =
            vec![0x60, 0, 0, 0, 0, u8::try_from(payload.len()).expect("a seed is short"), next, 64];
        packet.extend([&[0xfd; 16][..], &[0xfe; 16], payload].concat());
        [&[0x86, 0xdd, 0][..], &packet].concat()
    };
    vec![
        v4(6, &tcp),
        v4(17, &[0, 53, 0, 53, 0, 8, 0, 0]),
        v4(1, &[8, 0, 0, 0, 0, 0, 0, 0]),
        v6(6, &tcp),
        v6(58, &[135, 0, 0, 0, 0, 0, 0, 0]),
        v6(0, &[58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 0]),
        v6(44, &[17, 0, 0, 1, 0, 0, 0, 9, 0, 53, 0, 53, 0, 8, 0, 0]),
        vec![8, 6, 0],
    ]
}
