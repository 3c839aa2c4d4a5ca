//! Who sees what: a sniffer between the nodes, and one on every interface of both nodes.
//!
//! Where a sniffer stands to the guard decides what it proves. On the host-side end of a pod's veth
//!
//! ```text
//!  the pod sends    veth ─► sniffer ─► guard_from_pod ─► bridge, route ─► sniffers of other interfaces
//!  the pod is sent  bridge, route ─► guard_to_pod ─► sniffer ─► veth
//! ```
//! the kernel hands an incoming frame to packet sockets before it runs tc and tcx (`__netif_receive_skb_core`), and an
//! outgoing one after them (`dev_hard_start_xmit`). So a frame that comes *in* at a pod's own host-side end is what the
//! pod tried; every other sighting (in at the bridge, out at another pod's end, out at the uplink, on the wire) has
//! passed the guard, and has left. A program's captured connection goes over the pod's loopback to the agent: of it
//! nothing may be seen even as a try. A pod that makes frames by hand may try what it likes ([`Scope::Left`]), and its
//! tries being seen there, and nowhere else, is what proves that it made them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_netns::sniff::{Capture, Frame};
use mesh_netns::{Lab, Pod, Sniffer};

use crate::mesh::Mesh;

/// What clients ask for; no sniffer may see it.
pub(crate) const SECRET: &str = "a-secret-of-the-client";
/// What servers answer with.
const ANSWER: &str = "hello from";
/// What pods do with the mesh's TCP when it is not in a tunnel.
const IN_THE_CLEAR: &str = "tcp and not port 15008 and \
    (net 10.77.0.0/16 or net fd77:1::/64 or net fd77:2::/64)";

/// Which sightings count.
pub(crate) enum Scope<'s> {
    /// All of them.
    All,
    /// Those of what has passed the guard of this pod.
    Left(&'s End),
}

/// The host-side end of a pod's veth.
pub(crate) struct End {
    node: String,
    index: u32,
}

impl End {
    pub(crate) fn of(pod: &Pod) -> anyhow::Result<Self> {
        let index = pod.shell("cat /sys/class/net/eth0/iflink")?.output()?;
        Ok(Self { node: pod.node.clone(), index: index.trim().parse()? })
    }

    /// Where what the pod tries is seen.
    pub(crate) fn tries(&self) -> Place {
        (self.node.clone(), self.index, false)
    }

    /// Where what reaches the pod is seen.
    pub(crate) fn deliveries(&self) -> Place {
        (self.node.clone(), self.index, true)
    }
}

/// A place, an interface there (0 on the wire), and whether the frame went out by it.
pub(crate) type Place = (String, u32, bool);

/// Sniffers that run.
pub(crate) struct Watch {
    sniffers: Vec<(String, Sniffer)>,
}

/// What they saw, by place: the wire, and each node.
pub(crate) struct Seen {
    captures: Vec<(String, Capture)>,
}

const WIRE: &str = "wire";

impl Watch {
    /// Begins; `name` is not used twice.
    pub(crate) fn start(lab: &Lab, name: &str) -> anyhow::Result<Self> {
        let sniff = |place: &str, namespace: &str, interface: &str| -> anyhow::Result<_> {
            let name = format!("{name}-{place}");
            let sniffer = Sniffer::start(namespace, interface, lab.folder(), &name)?;
            Ok((place.to_owned(), sniffer))
        };
        let sniffers = vec![
            sniff(WIRE, lab.wire(), "br0")?,
            sniff("a", lab.node("a").netns(), "any")?,
            sniff("b", lab.node("b").netns(), "any")?,
        ];
        Ok(Self { sniffers })
    }

    pub(crate) fn finish(self) -> anyhow::Result<Seen> {
        let finish = |(place, sniffer): (String, Sniffer)| Ok((place, sniffer.finish()?));
        Ok(Seen { captures: self.sniffers.into_iter().map(finish).collect::<anyhow::Result<_>>()? })
    }
}

impl Seen {
    /// No payload of clients or servers, and no TCP but tunnels.
    pub(crate) fn nothing_in_the_clear(&self, scope: &Scope<'_>) -> anyhow::Result<()> {
        self.no_payload(scope)?;
        for (place, capture) in &self.captures {
            let packets = capture.packets(&scope.filter(place))?;
            let shown = &packets[..packets.len().min(5)];
            ensure!(packets.is_empty(), "{place}: {} outside tunnels: {shown:?}", packets.len());
        }
        Ok(())
    }

    /// No payload of clients or servers.
    pub(crate) fn no_payload(&self, scope: &Scope<'_>) -> anyhow::Result<()> {
        for payload in [SECRET, ANSWER] {
            let places = self.sightings(payload, scope)?;
            ensure!(places.is_empty(), "{payload:?} was seen at {places:?}");
        }
        Ok(())
    }

    /// Where `payload` was seen.
    pub(crate) fn sightings(
        &self,
        payload: &str,
        scope: &Scope<'_>,
    ) -> anyhow::Result<BTreeSet<Place>> {
        let mut found = BTreeSet::new();
        for (place, capture) in &self.captures {
            for frame in capture.frames()? {
                if scope.holds(place, &frame) && frame.contains(payload.as_bytes()) {
                    found.insert((place.clone(), frame.interface.unwrap_or(0), frame.outgoing));
                }
            }
        }
        Ok(found)
    }

    /// Where each payload was seen that begins with `prefix`, by what stands behind that, up to `!`.
    pub(crate) fn marked(&self, prefix: &str) -> anyhow::Result<BTreeMap<String, BTreeSet<Place>>> {
        let mut found: BTreeMap<String, BTreeSet<Place>> = BTreeMap::new();
        for (place, capture) in &self.captures {
            for frame in capture.frames()? {
                let text = String::from_utf8_lossy(&frame.bytes);
                let marks = text.split(prefix).skip(1).filter_map(|rest| rest.split('!').next());
                for mark in marks {
                    let place = (place.clone(), frame.interface.unwrap_or(0), frame.outgoing);
                    found.entry(mark.to_owned()).or_default().insert(place);
                }
            }
        }
        Ok(found)
    }

    /// How many packets of tunnels went between the nodes, and inside node a from pod to pod.
    pub(crate) fn tunnelled(&self, mesh: &Mesh) -> anyhow::Result<(usize, usize)> {
        let (client, mate) = (mesh.pod("client").ipv4, mesh.pod("mate").ipv4);
        let between = self.capture(WIRE)?.packets("tcp port 15008")?;
        let filter = format!("tcp port 15008 and host {client} and host {mate}");
        Ok((between.len(), self.capture("a")?.packets(&filter)?.len()))
    }

    /// Every connection of `pod` that was seen in the clear and matches the pcap filter `which` was opened at one of these
    /// times; how many were on the wire.
    pub(crate) fn opened_within(
        &self,
        pod: &Pod,
        scope: &Scope<'_>,
        which: &str,
        times: &[std::ops::Range<SystemTime>],
    ) -> anyhow::Result<usize> {
        let mut on_the_wire = 0;
        for (place, capture) in &self.captures {
            let of_pod = format!("(host {} or host {}) and {which}", pod.ipv4, pod.ipv6);
            let mut opened = BTreeSet::new();
            for line in capture.packets(&format!("{} and {of_pod}", scope.filter(place)))? {
                let (time, ends) = parse(&line).with_context(|| format!("tcpdump said {line}"))?;
                if line.contains("Flags [S],") {
                    let in_time = times.iter().any(|range| range.contains(&time));
                    ensure!(in_time, "{place}: opened in the clear while captured: {line}");
                    opened.insert(ends);
                } else {
                    ensure!(opened.contains(&ends), "{place}: in the clear, never opened: {line}");
                }
            }
            if place == WIRE {
                on_the_wire = opened.len();
            }
        }
        Ok(on_the_wire)
    }

    fn capture(&self, place: &str) -> anyhow::Result<&Capture> {
        let found = self.captures.iter().find(|(name, _)| name == place);
        Ok(&found.context("no such place")?.1)
    }
}

impl Scope<'_> {
    fn holds(&self, place: &str, frame: &Frame) -> bool {
        match self {
            Self::All => true,
            Self::Left(end) => {
                end.node != place || frame.interface != Some(end.index) || frame.outgoing
            }
        }
    }

    fn filter(&self, place: &str) -> String {
        match self {
            Self::Left(end) if end.node == place => {
                format!("{IN_THE_CLEAR} and not (ifindex {} and inbound)", end.index)
            }
            Self::Left(_) | Self::All => IN_THE_CLEAR.to_owned(),
        }
    }
}

/// The time and the two ends, in order, of a line such as
/// `1764313691.123456 eth0  Out IP 10.77.1.2.40000 > 10.77.2.2.8080: Flags [S], …`.
fn parse(line: &str) -> Option<(SystemTime, [String; 2])> {
    let (time, rest) = line.split_once(' ')?;
    let since = Duration::try_from_secs_f64(time.parse().ok()?).ok()?;
    let (from, rest) = rest.split_once(" > ")?;
    let from = from.rsplit(' ').next()?;
    let (to, _) = rest.split_once(": ")?;
    let mut ends = [from.to_owned(), to.to_owned()];
    ends.sort();
    Some((SystemTime::UNIX_EPOCH + since, ends))
}

/// The control of all others: what a pod outside the mesh says is seen, in and out, at every place it passes.
pub(crate) fn sees_a_plain_pod(mesh: &mut Mesh) -> anyhow::Result<()> {
    let watch = Watch::start(&mesh.lab, "control")?;
    mesh.curl("stranger")?.output()?;
    let seen = watch.finish()?;
    let stranger = End::of(mesh.pod("stranger"))?;
    let (server, mate) = (End::of(mesh.pod("server"))?, End::of(mesh.pod("mate"))?);
    let all = seen.sightings(SECRET, &Scope::All)?;
    let wanted =
        [(WIRE.to_owned(), 0, false), stranger.tries(), mate.deliveries(), server.deliveries()];
    for place in &wanted {
        ensure!(all.contains(place), "the request was not seen at {place:?}: {all:?}");
    }
    let answers = seen.sightings(ANSWER, &Scope::All)?;
    for end in [&server, &mate] {
        let place = end.tries();
        ensure!(answers.contains(&place), "the answer was not seen at {place:?}: {answers:?}");
    }
    let left = seen.sightings(SECRET, &Scope::Left(&stranger))?;
    ensure!(!left.contains(&wanted[1]) && left.contains(&wanted[0]), "of what left: {left:?}");
    for scope in [Scope::All, Scope::Left(&stranger)] {
        ensure!(seen.nothing_in_the_clear(&scope).is_err(), "plaintext passes for none");
        // Four connections, two of them between the nodes, all of them outside this time.
        let never = [SystemTime::UNIX_EPOCH..SystemTime::UNIX_EPOCH];
        let opened = seen.opened_within(mesh.pod("stranger"), &scope, "tcp", &never);
        ensure!(opened.is_err(), "connections pass for none");
        let always = [SystemTime::UNIX_EPOCH..SystemTime::now()];
        let opened = seen.opened_within(mesh.pod("stranger"), &scope, "tcp", &always)?;
        ensure!(opened == 2, "{opened} connections of 2 are on the wire");
    }
    Ok(())
}
