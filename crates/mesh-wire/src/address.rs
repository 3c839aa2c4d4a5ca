//! Addresses, prefixes, ports and names in their wire form.

use std::net::IpAddr;

use mesh_model::{
    GatewayAddress, GatewayDestination, IpPrefix, NamespacedHostname, NetworkAddress, NetworkId,
    ServicePort, canonical_ip, ports,
};

use crate::error::{InvalidResource, Problem, known, required};
use crate::pb::workload as pb;

/// An address of 4 or 16 bytes, canonical.
pub(crate) fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, InvalidResource> {
    let ip = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(v4)
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        IpAddr::from(v6)
    } else {
        return Err(InvalidResource::new(field, Problem::AddressLength { bytes: bytes.len() }));
    };
    Ok(canonical_ip(ip))
}

pub(crate) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A prefix. One of a mapped IPv4 address counts its bits from the IPv6 address's start.
pub(crate) fn prefix(
    field: &str,
    address: &[u8],
    length: u32,
) -> Result<IpPrefix, InvalidResource> {
    let ip = ip(field, address)?;
    let mapped = ip.is_ipv4() && address.len() == 16;
    let bits = if mapped { length.checked_sub(96) } else { Some(length) };
    bits.and_then(|bits| u8::try_from(bits).ok())
        .and_then(|bits| IpPrefix::new(ip, bits).ok())
        .ok_or_else(|| {
            InvalidResource::new(field, Problem::Prefix { text: format!("{ip}/{length}") })
        })
}

/// A port from 1 on.
pub(crate) fn port(field: &str, value: u32) -> Result<u16, InvalidResource> {
    match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(InvalidResource::new(field, Problem::Port { value })),
    }
}

/// A port, or 0 for "not set".
pub(crate) fn port_or_unset(field: &str, value: u32) -> Result<u16, InvalidResource> {
    if value == 0 { Ok(0) } else { port(field, value) }
}

pub(crate) fn service_port(wire: &pb::Port) -> Result<ServicePort, InvalidResource> {
    known::<pb::AppProtocol>("app_protocol", wire.app_protocol)?;
    Ok(ServicePort {
        service_port: port("service_port", wire.service_port)?,
        target_port: port_or_unset("target_port", wire.target_port)?,
    })
}

pub(crate) fn service_port_to_wire(port: &ServicePort) -> pb::Port {
    pb::Port {
        service_port: port.service_port.into(),
        target_port: port.target_port.into(),
        app_protocol: pb::AppProtocol::Unknown.into(),
    }
}

/// Splits `namespace/name`: two parts, neither empty.
pub(crate) fn two_parts(text: &str) -> Option<(&str, &str)> {
    text.split_once('/')
        .filter(|(first, second)| !first.is_empty() && !second.is_empty() && !second.contains('/'))
}

/// A service's key written `namespace/hostname`.
pub(crate) fn namespaced_hostname(
    field: &str,
    text: &str,
) -> Result<NamespacedHostname, InvalidResource> {
    two_parts(text)
        .map(|(namespace, hostname)| NamespacedHostname::new(namespace, hostname))
        .ok_or_else(|| InvalidResource::new(field, Problem::Name { text: text.to_owned() }))
}

pub(crate) fn network_address(
    wire: &pb::NetworkAddress,
) -> Result<NetworkAddress, InvalidResource> {
    Ok(NetworkAddress::new(NetworkId::new(&wire.network), ip("address", &wire.address)?))
}

pub(crate) fn network_address_to_wire(
    network: &NetworkId,
    ip: IpAddr,
    length: Option<u8>,
) -> pb::NetworkAddress {
    pb::NetworkAddress {
        network: network.as_str().to_owned(),
        address: ip_bytes(ip),
        length: length.map(u32::from),
    }
}

pub(crate) fn gateway(wire: &pb::GatewayAddress) -> Result<GatewayAddress, InvalidResource> {
    use pb::gateway_address::Destination;
    let destination = match &wire.destination {
        None => return Err(InvalidResource::new("destination", Problem::Missing)),
        Some(Destination::Hostname(name)) => GatewayDestination::Hostname(NamespacedHostname::new(
            required("hostname.namespace", &name.namespace)?,
            required("hostname.hostname", &name.hostname)?,
        )),
        Some(Destination::Address(address)) => GatewayDestination::Address(
            network_address(address).map_err(|error| error.within("address"))?,
        ),
    };
    let hbone_port = match port_or_unset("hbone_mtls_port", wire.hbone_mtls_port)? {
        0 => ports::HBONE,
        port => port,
    };
    Ok(GatewayAddress { destination, hbone_port })
}

pub(crate) fn gateway_to_wire(gateway: &GatewayAddress) -> pb::GatewayAddress {
    use pb::gateway_address::Destination;
    let destination = match &gateway.destination {
        GatewayDestination::Hostname(key) => Destination::Hostname(pb::NamespacedHostname {
            namespace: key.namespace.as_ref().to_owned(),
            hostname: key.hostname.as_ref().to_owned(),
        }),
        GatewayDestination::Address(address) => {
            Destination::Address(network_address_to_wire(&address.network, address.ip, None))
        }
    };
    pb::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: gateway.hbone_port.into(),
    }
}
