//! A waypoint is replaced while it is used.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_netns::traffic::Traffic;
use mesh_netns::wait::{PATIENCE, until};
use serde_json::Value;

use crate::shop::{CART, Shop};

/// Two pods of the waypoint; each in turn is taken out, ended, started again and taken back: no request fails.
pub(crate) fn replaced_under_traffic(shop: &mut Shop) -> anyhow::Result<()> {
    shop.run_waypoint("second")?;
    let mut traffic = Vec::new();
    for name in ["roll-1", "roll-2", "roll-3"] {
        let url = format!("http://{CART}:83/rolled");
        traffic.push(Traffic::start(shop, "client", name, &url)?);
    }
    let outcome = (|| {
        for name in ["waypoint", "second"] {
            shop.set_ready(name, false)?;
            for one in &traffic {
                one.more(15, "\"path\": \"/rolled\"")?;
            }
            shop.waypoint(name)?.stop(Duration::from_secs(15))?;
            for one in &traffic {
                one.more(15, "\"path\": \"/rolled\"")?;
            }
            shop.start_waypoint(name)?;
            shop.set_ready(name, true)?;
            for one in &traffic {
                one.more(15, "\"path\": \"/rolled\"")?;
            }
        }
        Ok(())
    })();
    for one in traffic {
        let counted = one.finish()?;
        ensure!(
            counted.failed == 0,
            "{} of {} failed:\n{}",
            counted.failed,
            counted.made,
            counted.log
        );
    }
    shop.delete_waypoint("second")?;
    outcome
}

/// The issuer of every certificate is revoked: the waypoint asks for another at once, and requests go through it again.
pub(crate) fn certified_anew(shop: &mut Shop) -> anyhow::Result<()> {
    let certs = shop.lab.node("a").culvert(&["certs", "-o", "json"])?.output()?;
    let certs: Value = serde_json::from_str(&certs)?;
    let issuer = certs[0]["certChain"][1]["serialNumber"].as_str().context("no issuer")?;
    let skip = shop.log().len();
    shop.lab.controller_command(&["ca", "revoke", "--serial", issuer])?;
    shop.line(skip, &["the certificate was revoked"])?;
    shop.line(skip, &["certified", "/ns/shop/sa/waypoint"])?;
    // The pods too, or whoever comes next is refused for that.
    for node in ["a", "b"] {
        until(&format!("node {node}'s pods being certified anew"), PATIENCE, || {
            let certs = shop.lab.node(node).culvert(&["certs", "-o", "json"])?.output()?;
            let certs: Vec<Value> = serde_json::from_str(&certs)?;
            let is_old = |cert: &Value| cert["certChain"][1]["serialNumber"] == issuer;
            Ok((!certs.iter().any(is_old)).then_some(()))
        })?;
    }
    until("requests going through the waypoint again", PATIENCE, || {
        Ok(shop.get("client", &format!("http://{CART}:83/anew"), &[])?.success().then_some(()))
    })
}
