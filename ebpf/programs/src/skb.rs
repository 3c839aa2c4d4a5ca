//! What both guards need of a packet and its interface.

use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{TC_ACT_SHOT, bpf_hdr_start_off::BPF_HDR_START_NET};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{Counter, Fetch, Packet, PodFlags, Refusal, parse_packet};

use crate::maps::{GUARDS, count, pod};

/// Goes on to the next program of the interface (`TC_ACT_UNSPEC`, which is `TCX_NEXT`).
pub const NEXT: i32 = -1;
/// Drops the packet.
pub const SHOT: i32 = TC_ACT_SHOT;

/// A packet's bytes from its network header on, wherever that lies.
struct Bytes<'a>(&'a TcContext);

impl Fetch for Bytes<'_> {
    #[inline(always)]
    fn fetch<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes N bytes, or fails and leaves none of them to be read.
        unsafe {
            let result = bpf_skb_load_bytes_relative(
                self.0.skb.skb.cast(),
                offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
                BPF_HDR_START_NET,
            );
            (result == 0).then(|| bytes.assume_init())
        }
    }
}

/// Judges the form of a packet.
#[inline(always)]
pub fn parse(ctx: &TcContext, into: &mut Packet) -> Result<(), Refusal> {
    let raw = ctx.skb.skb;
    // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
    let (protocol, tagged) = unsafe {
        (read_volatile(addr_of!((*raw).protocol)), read_volatile(addr_of!((*raw).vlan_present)))
    };
    #[expect(clippy::cast_possible_truncation, reason = "16 bits in network order")]
    let ethertype = u16::from_be(protocol as u16);
    parse_packet(&Bytes(ctx), ethertype, tagged != 0, into)
}

/// What is known of an interface.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// It belongs to a pod under capture.
    Active,
    /// It belongs to a pod that is being enrolled or unenrolled.
    Passive,
    /// It belongs to nobody.
    Unknown,
}

/// Finds the pod of an interface: its netns cookie and flags are filled in.
#[inline(always)]
pub fn guarded(ctx: &TcContext, cookie: &mut u64, flags: &mut PodFlags) -> Guarded {
    // SAFETY: as in `parse`.
    let interface = unsafe { read_volatile(addr_of!((*ctx.skb.skb).ifindex)) };
    // SAFETY: the value is one aligned word, copied at once.
    let Some(owner) = (unsafe { GUARDS.get(interface) }) else {
        return Guarded::Unknown;
    };
    *cookie = *owner;
    let Some(pod) = pod(*owner) else { return Guarded::Passive };
    *flags = PodFlags(pod.flags);
    if flags.has(PodFlags::OBSERVE) { Guarded::Passive } else { Guarded::Active }
}

/// Counts and drops.
#[inline(always)]
pub fn shoot(counter: Counter) -> i32 {
    count(counter);
    SHOT
}
