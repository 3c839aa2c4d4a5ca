//! Names as pods see them: the mesh's own are answered on the node, all others by the resolver the pod asked.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use mesh_netns::lab::{OUTSIDE_IP, OUTSIDE_IP6};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, manifest, servers};
use serde_json::{Value, json};

use crate::mesh::{Mesh, OUTSIDE_PORT, inside, sum_of};

/// What the resolver outside says to everything but [`OUTSIDE_NAME`] and [`NOWHERE_NAME`].
pub(crate) const ELSEWHERE_V4: [u8; 4] = [198, 51, 100, 7];
const ELSEWHERE_V6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];

/// The resolver knows it as the host outside the mesh.
pub(crate) const OUTSIDE_NAME: &str = "outside.dns.example";
/// A name that does not exist, says the resolver.
pub(crate) const NOWHERE_NAME: &str = "nowhere.dns.example";

/// The nameserver of the pods' resolv.conf, and the same by the other family.
const NAMESERVERS: [&str; 2] = [OUTSIDE_IP, OUTSIDE_IP6];

/// Far longer than an answer takes.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// What was asked, as it came.
type Asked = Arc<Mutex<Vec<(Transport, Vec<u8>)>>>;

/// The pods' resolver, on the host outside the mesh.
#[derive(Clone)]
pub(crate) struct Resolver {
    asked: Asked,
}

impl Resolver {
    /// Answers over UDP and TCP for as long as this program runs.
    pub(crate) fn start(namespace: &str) -> anyhow::Result<Self> {
        let (udp, tcp) = inside(namespace, || {
            Ok((UdpSocket::bind(("::", 53))?, TcpListener::bind(("::", 53))?))
        })?;
        let resolver = Self { asked: Arc::default() };
        let (over_udp, over_tcp) = (resolver.clone(), resolver.clone());
        std::thread::spawn(move || {
            let mut query = vec![0; 65_535];
            while let Ok((length, client)) = udp.recv_from(&mut query) {
                if let Some(answer) = over_udp.answer(Transport::Udp, &query[..length])
                    && let Err(error) = udp.send_to(&answer, client)
                {
                    eprintln!("resolver: {error}");
                }
            }
        });
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                let resolver = over_tcp.clone();
                std::thread::spawn(move || resolver.serve(stream));
            }
        });
        Ok(resolver)
    }

    fn serve(&self, mut stream: TcpStream) {
        while let Ok(query) = read_message(&mut stream) {
            let Some(answer) = self.answer(Transport::Tcp, &query) else { return };
            if write_message(&mut stream, &answer).is_err() {
                return;
            }
        }
    }

    /// One record of the type that was asked for; text for whatever is no address.
    fn answer(&self, transport: Transport, query: &[u8]) -> Option<Vec<u8>> {
        self.asked.lock().ok()?.push((transport, query.to_vec()));
        let mut end = 12;
        while *query.get(end)? != 0 {
            end += 1 + usize::from(query[end]);
        }
        let question = query.get(12..end + 5)?;
        let kind = u16::from_be_bytes([query[end + 1], query[end + 2]]);
        let is = |name: &str| first_label(name).is_some_and(|label| question.starts_with(&label));
        let address = |outside: &str, elsewhere: &[u8]| match outside.parse() {
            Ok(IpAddr::V4(ip)) if is(OUTSIDE_NAME) => ip.octets().to_vec(),
            Ok(IpAddr::V6(ip)) if is(OUTSIDE_NAME) => ip.octets().to_vec(),
            _other => elsewhere.to_vec(),
        };
        let data = match kind {
            1 => address(OUTSIDE_IP, &ELSEWHERE_V4),
            28 => address(OUTSIDE_IP6, &ELSEWHERE_V6),
            _ => b"\x07outside".to_vec(),
        };
        let mut answer = query[..2].to_vec();
        if is(NOWHERE_NAME) {
            answer.extend([0x81, 0x83, 0, 1, 0, 0, 0, 0, 0, 0]);
            answer.extend(question);
            return Some(answer);
        }
        answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend(question);
        answer.extend([0xc0, 12]);
        answer.extend(kind.to_be_bytes());
        answer.extend([0, 1, 0, 0, 0, 5]);
        answer.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        answer.extend(data);
        Some(answer)
    }

    /// Queries so far whose name begins with the first label of `name`.
    pub(crate) fn asked_about(&self, name: &str) -> Vec<Transport> {
        let label = first_label(name).unwrap_or_default();
        let asked = self.asked.lock().map(|asked| asked.clone()).unwrap_or_default();
        let about = |(_, query): &&(Transport, Vec<u8>)| query[12..].starts_with(&label);
        asked.iter().filter(about).map(|(transport, _)| *transport).collect()
    }

    /// True when exactly these bytes came.
    fn heard(&self, transport: Transport, query: &[u8]) -> bool {
        let asked = self.asked.lock().map(|asked| asked.clone()).unwrap_or_default();
        asked.iter().any(|(by, bytes)| *by == transport && bytes == query)
    }
}

/// The first label of a name as it is in a message.
fn first_label(name: &str) -> Option<Vec<u8>> {
    let first = name.split('.').next()?;
    Some([&[u8::try_from(first.len()).ok()?], first.as_bytes()].concat())
}

fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

fn query(name: &str, kind: RecordType) -> anyhow::Result<Message> {
    let mut query = Message::query();
    query.add_query(Query::query(Name::from_ascii(name)?, kind));
    query.metadata.recursion_desired = true;
    Ok(query)
}

/// What a pod is told about a name by the nameserver of its resolv.conf.
fn ask(
    mesh: &Mesh,
    pod: &str,
    name: &str,
    kind: RecordType,
    transport: Transport,
) -> anyhow::Result<Message> {
    ask_at(mesh, pod, OUTSIDE_IP, name, kind, transport)
}

/// What a pod is told about a name by a nameserver.
fn ask_at(
    mesh: &Mesh,
    pod: &str,
    nameserver: &str,
    name: &str,
    kind: RecordType,
    transport: Transport,
) -> anyhow::Result<Message> {
    let server = SocketAddr::new(nameserver.parse()?, 53);
    let answer = exchange(mesh, pod, server, &query(name, kind)?.to_vec()?, transport)?;
    Ok(Message::from_vec(&answer)?)
}

/// The addresses of a name, as a pod is told them over UDP.
pub(crate) fn looked_up(
    mesh: &Mesh,
    pod: &str,
    name: &str,
    kind: RecordType,
) -> anyhow::Result<Vec<IpAddr>> {
    Ok(addresses(&ask(mesh, pod, name, kind, Transport::Udp)?))
}

/// What a pod is answered to some bytes.
fn exchange(
    mesh: &Mesh,
    pod: &str,
    server: SocketAddr,
    query: &[u8],
    transport: Transport,
) -> anyhow::Result<Vec<u8>> {
    let answer = inside(mesh.lab.pod(pod).netns(), || match transport {
        Transport::Udp => {
            let any = if server.is_ipv4() { "0.0.0.0" } else { "::" };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(LIMIT))?;
            socket.connect(server)?;
            socket.send(query)?;
            let mut answer = vec![0; 4096];
            let length = socket.recv(&mut answer).context("no answer over UDP")?;
            answer.truncate(length);
            Ok(answer)
        }
        Transport::Tcp => {
            let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            write_message(&mut stream, query)?;
            read_message(&mut stream).context("no answer over TCP")
        }
    })?;
    ensure!(answer[..2] == query[..2], "the answer is to another query");
    Ok(answer)
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    message.answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}

pub(crate) fn service_entry(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": { "name": name, "namespace": "mesh" }, "spec": spec,
    })
}

/// Every nameserver over every transport.
fn ways() -> impl Iterator<Item = (&'static str, Transport)> {
    NAMESERVERS
        .into_iter()
        .flat_map(|server| [Transport::Udp, Transport::Tcp].map(|transport| (server, transport)))
}

/// The objects behind the names.
struct Names {
    objects: Vec<Value>,
    vips: [IpAddr; 2],
}

impl Names {
    fn new() -> anyhow::Result<Self> {
        let vips: [IpAddr; 2] = ["10.96.0.10".parse()?, "fd96::10".parse()?];
        let http = [("http", 80, servers::ports::HTTP)];
        let mut headless = manifest::service("mesh", "heads", "server", &[], &http);
        headless["spec"]["clusterIP"] = json!("None");
        headless["spec"]["clusterIPs"] = json!(["None"]);
        headless["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
        let endpoint = json!({ "address": OUTSIDE_IP });
        let port =
            json!({ "number": 80, "name": "http", "protocol": "TCP", "targetPort": OUTSIDE_PORT });
        let objects = vec![
            manifest::service("mesh", "web", "server", &vips, &http),
            headless,
            service_entry(
                "ext",
                &json!({
                    "hosts": ["ext.example.com"], "ports": [port], "resolution": "STATIC",
                    "location": "MESH_EXTERNAL", "endpoints": [endpoint],
                }),
            ),
            service_entry(
                "wild",
                &json!({
                    "hosts": ["*.wild.example"], "addresses": ["10.97.0.1"], "ports": [port],
                    "resolution": "STATIC", "location": "MESH_EXTERNAL", "endpoints": [endpoint],
                }),
            ),
        ];
        Ok(Self { objects, vips })
    }

    /// Runs `look` while the objects are there and known.
    fn with(mesh: &Mesh, look: impl FnOnce(&Self) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let names = Self::new()?;
        for object in &names.objects {
            mesh.lab.apply(object)?;
        }
        let known = until("the names being known", PATIENCE, || {
            for name in ["heads.mesh.svc.cluster.local.", "x.wild.example.", "ext.example.com."] {
                let answer = ask(mesh, "client", name, RecordType::A, Transport::Udp)?;
                if addresses(&answer).iter().any(|ip| *ip == IpAddr::from(ELSEWHERE_V4)) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        });
        let outcome = known.and_then(|()| look(&names));
        for object in &names.objects {
            mesh.lab.delete(object)?;
        }
        outcome
    }
}

/// Every kind of name, both families, over UDP and TCP, by both families; the resolver outside hears of none.
pub(crate) fn names_of_the_mesh(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    Names::with(mesh, |names| {
        let (pod4, pod6) = (mesh.lab.pod("server").ipv4, mesh.lab.pod("server").ipv6);
        let heard_before = mesh.resolver.asked_about("web").len();
        for (nameserver, transport) in ways() {
            let look = |name: &str, kind| -> anyhow::Result<Vec<IpAddr>> {
                let answer = ask_at(mesh, "client", nameserver, name, kind, transport);
                let what = || format!("{kind} {name} from {nameserver} over {transport:?}");
                Ok(addresses(&answer.with_context(what)?))
            };
            let exact = [
                ("web.mesh.svc.cluster.local.", names.vips[0], names.vips[1]),
                ("heads.mesh.svc.cluster.local.", pod4, pod6),
                ("server.heads.mesh.svc.cluster.local.", pod4, pod6),
            ];
            for (name, ipv4, ipv6) in exact {
                let (a, aaaa) = (look(name, RecordType::A)?, look(name, RecordType::AAAA)?);
                ensure!(a == [ipv4], "A {name} over {transport:?}: {a:?}");
                ensure!(aaaa == [ipv6], "AAAA {name} over {transport:?}: {aaaa:?}");
            }
            let a = look("any.thing.wild.example.", RecordType::A)?;
            ensure!(a == ["10.97.0.1".parse::<IpAddr>()?], "wildcard over {transport:?}: {a:?}");
            let a = look("ext.example.com.", RecordType::A)?;
            let aaaa = look("ext.example.com.", RecordType::AAAA)?;
            let automatic = |ips: &[IpAddr], prefix: &str| matches!(ips, [ip] if ip.to_string().starts_with(prefix));
            ensure!(automatic(&a, "240.240."), "automatic address over {transport:?}: {a:?}");
            ensure!(automatic(&aaaa, "2001:2:"), "automatic address over {transport:?}: {aaaa:?}");
        }
        let heard = mesh.resolver.asked_about("web").len() - heard_before;
        ensure!(heard == 0, "the resolver outside was asked {heard} times about the mesh's names");
        Ok(())
    })
}

/// Short names, as programs use them, through libc and its search list.
pub(crate) fn search_domains(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    Names::with(mesh, |names| {
        for (pod, name) in [
            ("client", "web"),
            ("client", "web.mesh"),
            ("visitor", "web.mesh"),
            ("visitor", "web.mesh.svc"),
        ] {
            for (database, vip) in [("ahostsv4", names.vips[0]), ("ahostsv6", names.vips[1])] {
                let found =
                    mesh.lab.pod(pod).shell(&format!("getent {database} {name}"))?.output()?;
                let first = found.split_whitespace().next().unwrap_or_default();
                ensure!(first == vip.to_string(), "{pod} finds {first} for {name}");
            }
        }
        // `web` alone is a name of the pod's own namespace, and far has none.
        let found = mesh.lab.pod("visitor").shell("getent ahostsv4 web")?.output()?;
        ensure!(
            !found.contains(&names.vips[0].to_string()),
            "far finds a service of mesh: {found}"
        );
        let answer = mesh.get("client", "web")?.context("http://web/ does not answer")?;
        ensure!(answer.contains("hello from server"), "http://web/ answers {answer}");
        Ok(())
    })
}

/// The automatic address of a ServiceEntry leads to its endpoint.
pub(crate) fn service_entry_is_reached_by_name(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    Names::with(mesh, |_names| {
        for host in ["ext.example.com", "any.wild.example"] {
            let answer = mesh.get("client", host)?.with_context(|| format!("http://{host}/"))?;
            ensure!(answer.contains("hello from outside"), "{host} answers {answer}");
        }
        Ok(())
    })
}

/// Names and types that are not the mesh's reach the pod's own resolver, and its answer the pod.
pub(crate) fn other_names_are_forwarded(mesh: &mut Mesh) -> anyhow::Result<()> {
    for (nameserver, transport) in ways() {
        let family = if nameserver == OUTSIDE_IP { "ipv4" } else { "ipv6" };
        let first = format!("over-{transport:?}-{family}").to_lowercase();
        let name = format!("{first}.unknown.example.");
        let way = format!("from {nameserver} over {transport:?}");
        let look = |kind| {
            ask_at(mesh, "client", nameserver, &name, kind, transport)
                .with_context(|| format!("{kind} {way}"))
        };
        let a = addresses(&look(RecordType::A)?);
        ensure!(a == [IpAddr::from(ELSEWHERE_V4)], "A {way}: {a:?}");
        let aaaa = addresses(&look(RecordType::AAAA)?);
        ensure!(aaaa == [IpAddr::from(ELSEWHERE_V6)], "AAAA {way}: {aaaa:?}");
        let text = look(RecordType::TXT)?;
        ensure!(text.answers.len() == 1, "TXT {way}: {text:?}");
        let heard = mesh.resolver.asked_about(&first);
        ensure!(heard == [transport; 3], "the resolver outside heard {heard:?}");
    }
    Ok(())
}

/// Names of the cluster's own that the mesh has no answer to, an alias's and a named port's, are asked of the pod's own resolver, in the
/// cluster's DNS; those beside them are not.
pub(crate) fn names_of_the_clusters_own_dns(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let alias = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "alias", "namespace": "mesh" },
        "spec": { "type": "ExternalName", "externalName": OUTSIDE_NAME },
    });
    mesh.lab.apply(&alias)?;
    let outcome = Names::with(mesh, |_names| {
        for (nameserver, transport) in ways() {
            let way = format!("from {nameserver} over {transport:?}");
            let look = |name: &str, kind| -> anyhow::Result<(Message, usize)> {
                let before = mesh.resolver.asked_about(name).len();
                let answer = ask_at(mesh, "client", nameserver, name, kind, transport)
                    .with_context(|| format!("{kind} {name} {way}"))?;
                Ok((answer, mesh.resolver.asked_about(name).len() - before))
            };
            let (answer, asked) = look("alias.mesh.svc.cluster.local.", RecordType::A)?;
            let found = addresses(&answer);
            ensure!(
                asked == 1 && found == [IpAddr::from(ELSEWHERE_V4)],
                "{way}: {asked} {found:?}"
            );
            // What the resolver says to it is no SRV record, so its bytes are not read here.
            let named = "_http._tcp.web.mesh.svc.cluster.local.";
            let server = SocketAddr::new(nameserver.parse()?, 53);
            let before = mesh.resolver.asked_about(named).len();
            exchange(mesh, "client", server, &query(named, RecordType::SRV)?.to_vec()?, transport)
                .with_context(|| format!("{named} {way}"))?;
            let asked = mesh.resolver.asked_about(named).len() - before;
            ensure!(asked == 1, "{named} {way} was asked {asked} times");
            let (answer, asked) = look("web.mesh.svc.cluster.local.", RecordType::SRV)?;
            ensure!(asked == 0 && !answer.answers.is_empty(), "the service itself {way}: {asked}");
        }
        Ok(())
    });
    mesh.lab.delete(&alias)?;
    outcome
}

/// What is not the mesh's to read reaches the pod's own resolver byte for byte: another opcode, though it be about a name
/// of the mesh, and a datagram longer than any query.
pub(crate) fn what_is_forwarded_is_whole(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    Names::with(mesh, |_names| {
        let mut queries = Vec::new();
        for opcode in [OpCode::Notify, OpCode::Update] {
            let mut query = query("web.mesh.svc.cluster.local.", RecordType::A)?;
            query.metadata.op_code = opcode;
            let query = query.to_vec()?;
            for transport in [Transport::Udp, Transport::Tcp] {
                queries.push((format!("{opcode:?}"), query.clone(), transport));
            }
        }
        let mut long = query("long.unknown.example.", RecordType::A)?.to_vec()?;
        long.resize(5000, 0x5a);
        queries.push(("a long datagram".to_owned(), long, Transport::Udp));
        for nameserver in NAMESERVERS {
            let server = SocketAddr::new(nameserver.parse()?, 53);
            for (what, query, transport) in &mut queries {
                // Nobody has sent these bytes before.
                query[0] ^= u8::from(server.is_ipv6());
                let way = format!("{what} to {server} over {transport:?}");
                let answer = exchange(mesh, "client", server, query, *transport)
                    .with_context(|| way.clone())?;
                ensure!(answer.ends_with(&ELSEWHERE_V4), "{way}: {answer:?}");
                ensure!(mesh.resolver.heard(*transport, query), "{way} was changed");
            }
        }
        Ok(())
    })
}

/// A client that ends its side after its queries is still answered each of them, and then the connection ends.
pub(crate) fn client_that_asks_no_more(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    Names::with(mesh, |_names| {
        let server = SocketAddr::new(OUTSIDE_IP.parse()?, 53);
        for count in [1_u8, 5] {
            let query = query("half.unknown.example.", RecordType::A)?.to_vec()?;
            let ids = inside(mesh.lab.pod("client").netns(), || {
                let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
                stream.set_read_timeout(Some(LIMIT))?;
                for id in 0..count {
                    let mut query = query.clone();
                    query[1] = id;
                    write_message(&mut stream, &query)?;
                }
                stream.shutdown(std::net::Shutdown::Write)?;
                let mut ids = Vec::new();
                while let Ok(answer) = read_message(&mut stream) {
                    ids.push(answer[1]);
                }
                Ok(ids)
            })?;
            ensure!(ids == (0..count).collect::<Vec<_>>(), "{count} queries: {ids:?}");
        }
        Ok(())
    })
}

/// A pod whose annotation leaves DNS alone asks its own resolver, also about names of the mesh.
pub(crate) fn pod_that_keeps_its_own_names(mesh: &mut Mesh) -> anyhow::Result<()> {
    let spec = PodSpec::new("mesh", "own-names").annotation("culvert.dev/dns-capture", "false");
    mesh.lab.run_pod("a", spec)?;
    // It is captured otherwise.
    mesh.wait_for("own-names", mesh.server())?;
    let looked = Names::with(mesh, |names| {
        for transport in [Transport::Udp, Transport::Tcp] {
            let name = "web.mesh.svc.cluster.local.";
            let own = addresses(&ask(mesh, "own-names", name, RecordType::A, transport)?);
            ensure!(own == [IpAddr::from(ELSEWHERE_V4)], "over {transport:?}: {own:?}");
            let other = addresses(&ask(mesh, "client", name, RecordType::A, transport)?);
            ensure!(other == [names.vips[0]], "another pod over {transport:?}: {other:?}");
        }
        Ok(())
    });
    mesh.lab.delete_pod("own-names")?;
    looked
}

/// Where no resolver is, the pod is told at once, as it would be by its own socket; it does not wait for its patience to end.
pub(crate) fn resolver_that_is_not_there(mesh: &mut Mesh) -> anyhow::Result<()> {
    const AT_ONCE: Duration = Duration::from_millis(100);
    const WORST: Duration = Duration::from_secs(1);
    // The other node has no resolver.
    let server = SocketAddr::new(mesh.lab.node("b").ipv4, 53);
    let mut took = Vec::new();
    for number in 0..5 {
        let query = query(&format!("nobody-{number}.unknown.example."), RecordType::A)?.to_vec()?;
        let asked = Instant::now();
        let answer = exchange(mesh, "client", server, &query, Transport::Udp)?;
        took.push(asked.elapsed());
        let answer = Message::from_vec(&answer)?;
        ensure!(answer.response_code == ResponseCode::ServFail, "{answer:?}");
    }
    took.sort();
    ensure!(took[2] < AT_ONCE && took[4] < WORST, "answers took {took:?}");
    Ok(())
}

/// A pod is known by its address, and by the host name it gives itself under a headless service.
pub(crate) fn names_of_pods(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut spec = PodSpec::new("mesh", "db-7f").app("server");
    spec.host = Some(("first".to_owned(), "heads".to_owned()));
    let ip = mesh.lab.run_pod("b", spec)?.ipv4;
    let dashed = ip.to_string().replace('.', "-");
    let looked = Names::with(mesh, |_names| {
        for name in [
            format!("{dashed}.mesh.pod.cluster.local."),
            "first.heads.mesh.svc.cluster.local.".to_owned(),
            "db-7f.heads.mesh.svc.cluster.local.".to_owned(),
        ] {
            until(&format!("{name} being answered"), PATIENCE, || {
                let found = addresses(&ask(mesh, "client", &name, RecordType::A, Transport::Udp)?);
                Ok((found == [ip]).then_some(()))
            })?;
        }
        let other = format!("{dashed}.far.pod.cluster.local.");
        let found = addresses(&ask(mesh, "client", &other, RecordType::A, Transport::Udp)?);
        ensure!(found == [IpAddr::from(ELSEWHERE_V4)], "of another namespace: {found:?}");
        Ok(())
    });
    mesh.lab.delete_pod("db-7f")?;
    looked
}
/// An answer of the pod's resolver is given again while its TTL lasts, with what is left of it, and not longer. Every query
/// and every answer is counted as Istio counts them.
pub(crate) fn answers_are_kept_for_their_ttl(mesh: &mut Mesh) -> anyhow::Result<()> {
    const FIRST: &str = "kept";
    const TTL: Duration = Duration::from_secs(5);
    let name = format!("{FIRST}.unknown.example.");
    let labels = [
        ("request_query_type", "A"),
        ("request_protocol", "udp"),
        ("source_canonical_service", "client"),
    ];
    let counted = |mesh: &Mesh| -> anyhow::Result<[f64; 3]> {
        let metrics = mesh.lab.node("a").metrics()?;
        Ok(["requests_total", "upstream_requests_total", "upstream_request_duration_seconds_count"]
            .map(|name| sum_of(&metrics, &format!("istio_dns_{name}"), &labels)))
    };
    let before = counted(mesh)?;
    let begun = Instant::now();
    let mut asked = 0.0;
    loop {
        // The answer was kept at the earliest now, and its whole seconds are counted down.
        let age = begun.elapsed();
        let answer = ask(mesh, "client", &name, RecordType::A, Transport::Udp)?;
        asked += 1.0;
        ensure!(addresses(&answer) == [IpAddr::from(ELSEWHERE_V4)], "{answer:?}");
        let left = Duration::from_secs(answer.answers.first().context("no record")?.ttl.into());
        match mesh.resolver.asked_about(FIRST).len() {
            1 => {
                ensure!(age < TTL, "an answer of {TTL:?} was given after {age:?}");
                // What the question took on its way is not yet in the age.
                ensure!(left <= TTL, "{left:?} are left of {TTL:?}");
                ensure!(asked < 2.0 || left < TTL, "given again as if it were new");
            }
            2 => break,
            more => anyhow::bail!("the resolver was asked {more} times within {age:?}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(asked > 3.0, "nothing was kept: {asked} queries");
    let [requests, forwarded, timed] = counted(mesh)?;
    let more = [requests - before[0], forwarded - before[1], timed - before[2]];
    ensure!(more == [asked, 2.0, 2.0], "{asked} queries, two of them forwarded: counted {more:?}");
    Ok(())
}
