//! A namespace behind a waypoint: real programs through it, routes, policy on requests, and every way around it.
//!
//! One lab; the trials run in order, each leaves the lab as it found it.

mod bypass;
mod jwt;
mod policy;
mod programs;
mod rolling;
mod routes;
mod shop;

use mesh_netns::trials::{self, Named};

use crate::shop::Shop;

const STEPS: &[Named<Shop>] = &[
    ("programs::curl", programs::curl),
    ("programs::many_at_once", programs::many_at_once),
    ("programs::misbehaving_servers", programs::misbehaving_servers),
    ("programs::grpc", programs::grpc),
    ("programs::websocket", programs::websocket),
    ("programs::tcp", programs::tcp),
    ("programs::large_bodies", programs::large_bodies),
    ("programs::what_the_server_sees", programs::what_the_server_sees),
    ("programs::smuggling", programs::smuggling),
    ("programs::cookies_in_pieces", programs::cookies_in_pieces),
    ("programs::more_than_a_tunnel_takes", programs::more_than_a_tunnel_takes),
    ("routes::by_header", routes::by_header),
    ("routes::filters", routes::filters),
    ("routes::of_grpc", routes::of_grpc),
    ("routes::of_a_consumer", routes::of_a_consumer),
    ("routes::invalid_references", routes::invalid_references),
    ("routes::retries_and_timeouts", routes::retries_and_timeouts),
    ("routes::nothing_is_done_twice", routes::nothing_is_done_twice),
    ("routes::round_in_circles", routes::round_in_circles),
    ("routes::change_under_traffic", routes::change_under_traffic),
    ("policy::deny_by_path", policy::deny_by_path),
    ("policy::one_form_of_a_path", policy::one_form_of_a_path),
    ("policy::of_what_a_route_leads_to", policy::of_what_a_route_leads_to),
    ("policy::undeclared_ports", policy::undeclared_ports),
    ("policy::of_the_gateway", policy::of_the_gateway),
    ("policy::allow_by_identity_and_method", policy::allow_by_identity_and_method),
    ("policy::explained", policy::explained),
    ("jwt::matrix", jwt::matrix),
    ("jwt::claims_judge", jwt::claims_judge),
    ("jwt::what_the_server_sees", jwt::what_the_server_sees),
    ("jwt::nobody_else_is_trusted", jwt::nobody_else_is_trusted),
    ("jwt::keys_from_elsewhere", jwt::keys_from_elsewhere),
    ("jwt::keys_by_discovery_over_tls", jwt::keys_by_discovery_over_tls),
    ("jwt::explained", jwt::explained),
    ("rolling::replaced_under_traffic", rolling::replaced_under_traffic),
    ("rolling::certified_anew_after_a_revocation", rolling::certified_anew),
    ("bypass::by_pod_address", bypass::by_pod_address),
    ("bypass::in_plaintext", bypass::in_plaintext),
    ("bypass::waypoint_stopped", bypass::waypoint_stopped),
    ("bypass::another_identity", bypass::another_identity),
    ("bypass::of_a_workload", bypass::of_a_workload),
    ("bypass::the_waypoint_is_no_open_proxy", bypass::no_open_proxy),
    ("bypass::gateway_deleted", bypass::gateway_deleted),
    ("bypass::waypoint_deleted", bypass::waypoint_deleted),
];

fn main() -> anyhow::Result<()> {
    trials::run(Shop::start, STEPS, |shop| {
        let log = |node| shop.lab.node(node).agent_log(12);
        format!("--- a\n{}\n--- b\n{}\n--- waypoint\n{}", log("a"), log("b"), shop.log_tail(30))
    })
}
