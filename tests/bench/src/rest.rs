//! The rows about what a mesh costs while nothing happens: memory, CPU and wakeups at rest, quiet streams.

use std::time::Duration;

use mesh_netns::wait::until;
use mesh_netns::{PodSpec, Process, manifest};

use crate::cpu;
use crate::measure::total_cpu;
use crate::report::Row;
use crate::topology::{CULVERT, Distance, STOCK, Topology};

const GROUP: &str = "at rest";
/// How long opening the quiet streams may take.
const OPENING: Duration = Duration::from_secs(120);
/// How long the agents may take to hear of pods that came or went.
const CHURNING: Duration = Duration::from_secs(60);
/// How long after the start, or after a load, memory is looked at.
const SETTLING: Duration = Duration::from_secs(15);

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Quiet streams to open.
    pub(crate) streams: usize,
    /// Pods on node a for the row on many pods.
    pub(crate) pods: usize,
    /// Pods that come and go in the index.
    pub(crate) churn: u16,
    /// How long CPU and wakeups at rest are counted.
    pub(crate) watch: Duration,
}

/// The larger RSS of the processes, MiB.
pub(crate) fn rss(pids: &[u32]) -> anyhow::Result<f64> {
    let each: Vec<f64> = pids.iter().map(|pid| cpu::rss_mib(*pid)).collect::<Result<_, _>>()?;
    Ok(each.iter().copied().fold(0.0, f64::max))
}

/// Memory of the relays, by way: `culvert` an agent, `stock` a relay.
fn memory(topology: &Topology, name: &str) -> anyhow::Result<Row> {
    let mut row = Row::new(GROUP, name, "MiB", false);
    for way in topology.ways(Distance::AcrossNodes) {
        if way.name == STOCK || way.name == CULVERT {
            row.push(way.name, Some(rss(&way.relays)?));
        }
    }
    Ok(row)
}

/// Memory after everything before, once it had time to come back.
pub(crate) fn memory_after(topology: &Topology, name: &str) -> anyhow::Result<Row> {
    std::thread::sleep(SETTLING);
    memory(topology, name)
}

/// Opens quiet streams through each way and looks at what they cost.
pub(crate) fn quiet_streams(topology: &Topology, extent: Extent) -> anyhow::Result<Vec<Row>> {
    let named = |what: &str| format!("{} quiet streams, {what}", extent.streams);
    let mut rows = vec![
        Row::new(GROUP, &named("memory each, both relays"), "KiB", false),
        Row::new(GROUP, &named("both relays' CPU per minute"), "ms", false),
        Row::new(GROUP, &named("both relays' wakeups"), "1/s", false),
    ];
    for way in topology.ways(Distance::AcrossNodes) {
        if way.name != STOCK && way.name != CULVERT {
            continue;
        }
        eprintln!("{} quiet streams through {}", extent.streams, way.name);
        let before = total_rss(&way.relays)?;
        let pod = topology.pod(way.client);
        let mut command = pod.command(topology.program());
        command.args(["hold", &way.target.to_string(), &extent.streams.to_string()]);
        let mut client = pod.start(&format!("hold-{}", way.name), &mut command)?;
        until("the quiet streams", OPENING, || opened(&mut client))?;
        std::thread::sleep(SETTLING);
        #[expect(clippy::cast_precision_loss, reason = "a count of sockets")]
        let each = (total_rss(&way.relays)? - before) * 1024.0 / extent.streams as f64;
        let (cpu_ms, wakeups) = watch(&way.relays, extent.watch)?;
        for (row, value) in rows.iter_mut().zip([each, cpu_ms, wakeups]) {
            row.push(way.name, Some(value));
        }
        client.kill();
    }
    Ok(rows)
}

fn opened(client: &mut Process) -> anyhow::Result<Option<()>> {
    if !client.running() {
        anyhow::bail!("the client ended: {}", client.log_tail(5));
    }
    Ok(client.log().contains("holding").then_some(()))
}

/// Lets pods of another node come and go, twice, and looks at the agents' memory before, in between and after.
pub(crate) fn churn(topology: &Topology, pods: u16) -> anyhow::Result<Vec<Row>> {
    let lab = &topology.lab;
    lab.apply(&manifest::node("c", &["192.168.77.3".parse()?], &["10.99.0.0/16"]))?;
    let known = |node: &str| -> anyhow::Result<usize> {
        let workloads = lab.node(node).culvert(&["config", "workloads", "-o", "json"])?;
        Ok(workloads.output()?.matches("\"name\": \"distant-").count())
    };
    let all_know = |count: usize| {
        ["a", "b"].iter().try_for_each(|node| {
            until("the agents knowing the pods", CHURNING, || {
                Ok((known(node)? == count).then_some(()))
            })
        })
    };
    let agents = topology.agents();
    let mut seen = vec![("before", rss(&agents)?)];
    for when in ["with them", "with them again"] {
        eprintln!("{pods} pods come and go");
        for number in 0..pods {
            lab.apply(&manifest::distant_pod("mesh", number))?;
        }
        all_know(usize::from(pods))?;
        seen.push((when, rss(&agents)?));
        for number in 0..pods {
            lab.delete(&manifest::distant_pod("mesh", number))?;
        }
        all_know(0)?;
    }
    std::thread::sleep(SETTLING);
    seen.push(("after", rss(&agents)?));
    Ok(seen
        .into_iter()
        .map(|(when, value)| {
            let name = format!("agent's RSS, {pods} pods come and go twice, {when}");
            let mut row = Row::new(GROUP, &name, "MiB", false);
            row.push(CULVERT, Some(value));
            row
        })
        .collect())
}

/// What an agent costs at rest, with few pods and with many.
pub(crate) fn pods_at_rest(topology: &mut Topology, extent: Extent) -> anyhow::Result<Vec<Row>> {
    let mut rows = agent_at_rest(topology, crate::topology::PODS, extent)?;
    for number in crate::topology::PODS..extent.pods {
        if number % 20 == 0 {
            eprintln!("{number} of {} pods", extent.pods);
        }
        topology.lab.run_pod("a", PodSpec::new("mesh", &format!("r{number}")))?;
    }
    rows.extend(agent_at_rest(topology, extent.pods, extent)?);
    Ok(rows)
}

fn agent_at_rest(topology: &Topology, pods: usize, extent: Extent) -> anyhow::Result<Vec<Row>> {
    let agent: Vec<u32> = topology.agents().into_iter().take(1).collect();
    // Certificates are fetched and tunnels end meanwhile.
    std::thread::sleep(SETTLING);
    let (cpu_ms, wakeups) = watch(&agent, extent.watch)?;
    Ok([
        ("CPU per minute", "ms", cpu_ms),
        ("wakeups", "1/s", wakeups),
        ("RSS", "MiB", rss(&agent)?),
    ]
    .into_iter()
    .map(|(what, unit, value)| {
        let mut row = Row::new(GROUP, &format!("agent with {pods} pods, {what}"), unit, false);
        row.push(CULVERT, Some(value));
        row
    })
    .collect())
}

/// CPU milliseconds per minute and wakeups per second.
fn watch(pids: &[u32], how_long: Duration) -> anyhow::Result<(f64, f64)> {
    let total =
        |pids: &[u32]| pids.iter().map(|pid| cpu::wakeups(*pid)).sum::<anyhow::Result<f64>>();
    let (cpu_before, wakeups_before) = (total_cpu(pids)?, total(pids)?);
    std::thread::sleep(how_long);
    let seconds = how_long.as_secs_f64();
    let cpu_ms = (total_cpu(pids)? - cpu_before) * 1000.0 * 60.0 / seconds;
    Ok((cpu_ms, (total(pids)? - wakeups_before) / seconds))
}

fn total_rss(pids: &[u32]) -> anyhow::Result<f64> {
    pids.iter().map(|pid| cpu::rss_mib(*pid)).sum()
}
