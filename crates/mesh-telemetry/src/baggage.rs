//! The `baggage` header: how a peer describes its workload.

use std::fmt;
use std::sync::Arc;

use mesh_model::{Workload, WorkloadKind};

/// A workload as it is described to the far side. Empty text where nothing is said.
///
/// Informative only: labels of telemetry may come from it, decisions never do.
/// Source: istio/ztunnel `src/baggage.rs`; W3C Baggage without its percent encoding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: Arc<str>,
    /// `k8s.namespace.name`.
    pub namespace: Arc<str>,
    /// The kind in `k8s.<kind>.name`.
    pub kind: WorkloadKind,
    /// The owner's name, value of `k8s.<kind>.name`.
    pub workload: Arc<str>,
    /// `service.name`.
    pub service: Arc<str>,
    /// `service.version`.
    pub revision: Arc<str>,
    /// `cloud.region`.
    pub region: Arc<str>,
    /// `cloud.availability_zone`.
    pub zone: Arc<str>,
}

/// Longest sum of values that is read, bytes; what comes after says nothing.
pub const MAX_BYTES: usize = 8192;
/// Most members that are read. Source: W3C Baggage §3.3.2 asks for 64.
pub const MAX_MEMBERS: usize = 64;
/// Longest value that is taken over, bytes: the longest name Kubernetes has.
pub const MAX_VALUE_BYTES: usize = 253;

impl Baggage {
    /// Reads the values of a header that may be repeated. Later members go before earlier ones; unknown keys, empty
    /// values and values that are too long or hold control characters are passed over; a value that is no text means
    /// that nothing is said at all.
    #[must_use]
    pub fn parse<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut baggage = Self::default();
        let mut bytes = 0;
        let mut members = 0;
        for value in values {
            bytes += value.len();
            if bytes > MAX_BYTES {
                break;
            }
            let Ok(text) = std::str::from_utf8(value) else { return Self::default() };
            for member in text.split(',') {
                members += 1;
                if members > MAX_MEMBERS {
                    return baggage;
                }
                baggage.take(member);
            }
        }
        baggage
    }

    fn take(&mut self, member: &str) {
        let mut parts = member.split('=');
        let (Some(key), Some(value)) = (parts.next(), parts.next()) else { return };
        let value = value.trim();
        if value.is_empty() || value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control)
        {
            return;
        }
        let value: Arc<str> = value.into();
        match key.trim() {
            "k8s.cluster.name" => self.cluster = value,
            "k8s.namespace.name" => self.namespace = value,
            "k8s.deployment.name" => self.name(WorkloadKind::Deployment, value),
            "k8s.cronjob.name" => self.name(WorkloadKind::CronJob, value),
            "k8s.pod.name" => self.name(WorkloadKind::Pod, value),
            "k8s.job.name" => self.name(WorkloadKind::Job, value),
            "service.name" => self.service = value,
            "service.version" => self.revision = value,
            "cloud.region" => self.region = value,
            "cloud.availability_zone" => self.zone = value,
            _ => {}
        }
    }

    fn name(&mut self, kind: WorkloadKind, value: Arc<str>) {
        self.kind = kind;
        self.workload = value;
    }

    /// True when nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self { kind: self.kind, ..Self::default() }
    }
}

impl From<&Workload> for Baggage {
    fn from(workload: &Workload) -> Self {
        Self {
            cluster: Arc::clone(&workload.cluster_id),
            namespace: Arc::clone(&workload.namespace),
            kind: workload.kind,
            workload: Arc::clone(&workload.workload_name),
            service: Arc::clone(&workload.canonical_name),
            revision: Arc::clone(&workload.canonical_revision),
            region: Arc::clone(&workload.locality.region),
            zone: Arc::clone(&workload.locality.zone),
        }
    }
}

/// A value that the header's grammar can carry and the far side reads back unchanged.
fn carried(value: &str) -> bool {
    (1..=MAX_VALUE_BYTES).contains(&value.len())
        && value.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b',' | b'='))
}

impl fmt::Display for Baggage {
    /// The header's value; empty and uncarriable members are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            WorkloadKind::Deployment => "k8s.deployment.name",
            WorkloadKind::CronJob => "k8s.cronjob.name",
            WorkloadKind::Pod => "k8s.pod.name",
            WorkloadKind::Job => "k8s.job.name",
        };
        let members = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (name, &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let carried = members.into_iter().filter(|(_, value)| carried(value));
        for (position, (key, value)) in carried.enumerate() {
            let comma = if position == 0 { "" } else { "," };
            write!(f, "{comma}{key}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn members_come_in_their_order_without_the_empty_ones() {
        let baggage = Baggage {
            cluster: "Kubernetes".into(),
            namespace: "shop".into(),
            kind: WorkloadKind::Pod,
            workload: "cart".into(),
            service: "cart-service".into(),
            revision: "latest".into(),
            region: "".into(),
            zone: "eu-1a".into(),
        };
        assert_eq!(
            baggage.to_string(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=cart,service.name=cart-service,\
             service.version=latest,cloud.availability_zone=eu-1a"
        );
    }

    #[test]
    fn a_repeated_header_is_one_list() {
        let values: [&[u8]; 2] = [b"k8s.namespace.name=a,service.name=b", b"k8s.job.name=c"];
        let baggage = Baggage::parse(values);
        assert_eq!(&*baggage.namespace, "a");
        assert_eq!(&*baggage.service, "b");
        assert_eq!((baggage.kind, &*baggage.workload), (WorkloadKind::Job, "c"));
    }

    #[test]
    fn odd_members_are_passed_over() {
        let check = |value: &[u8], service: &str| {
            let values: [&[u8]; 1] = [value];
            assert_eq!(&*Baggage::parse(values).service, service, "{value:?}");
        };
        check(b"service.name=a=b", "a");
        check(b"service.name=", "");
        check(b"service.name", "");
        check(b"service.name=a\nb", "");
        check(b"unknown=1,service.name=x", "x");
        check(b" service.name = x ", "x");
        check(&[b"service.name=x,", &[0xff][..]].concat(), "");
        check(&[b"service.name=", "a".repeat(254).as_bytes()].concat(), "");
        check(&[",".repeat(64).as_bytes(), b"service.name=x"].concat(), "");
    }

    #[test]
    fn what_the_grammar_cannot_carry_is_not_sent() {
        let baggage =
            Baggage { namespace: "a,b=c".into(), service: "x".into(), ..Baggage::default() };
        assert_eq!(baggage.to_string(), "service.name=x");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(values: Vec<Vec<u8>>) {
            let baggage = Baggage::parse(values.iter().map(Vec::as_slice));
            prop_assert!(baggage.service.len() <= MAX_VALUE_BYTES);
        }

        #[test]
        fn formatting_and_parsing_agree(
            parts in proptest::array::uniform7("([a-z0-9.-]{1,40})?"),
            kind in prop_oneof![
                Just(WorkloadKind::Deployment),
                Just(WorkloadKind::CronJob),
                Just(WorkloadKind::Pod),
                Just(WorkloadKind::Job),
            ],
        ) {
            let [cluster, namespace, workload, service, revision, region, zone] =
                parts.map(Arc::<str>::from);
            let kind = if workload.is_empty() { WorkloadKind::Pod } else { kind };
            let baggage =
                Baggage { cluster, namespace, kind, workload, service, revision, region, zone };
            let text = baggage.to_string();
            prop_assert_eq!(Baggage::parse([text.as_bytes()]), baggage);
        }
    }
}
