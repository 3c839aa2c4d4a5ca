//! The upstream programs, built from Go modules once and kept outside the checkout.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

use super::go;
use crate::command::{cache, command, output_of, root, run};
use crate::oci::sha256;

/// One Go module of `tests/cluster`. Each has its own because their Kubernetes libraries differ.
pub(super) struct ToolSet {
    /// Its folder in `tests/cluster`.
    name: &'static str,
    /// What Go builds: (package, program).
    packages: &'static [(&'static str, &'static str)],
    /// Linker flags beyond the common ones.
    stamps: &'static [&'static str],
    /// How long a first build takes on two cores.
    takes: &'static str,
}

pub(super) const KUBERNETES: ToolSet = ToolSet {
    name: "kube",
    packages: &[
        ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
        ("k8s.io/kubernetes/cmd/kube-controller-manager", "kube-controller-manager"),
        ("k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"),
        ("k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"),
        ("k8s.io/kubernetes/cmd/kubectl", "kubectl"),
        ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
    ],
    // Without these every program says that it is v0.0.0.
    stamps: &[
        "k8s.io/component-base/version.gitVersion=v1.34.4",
        "k8s.io/component-base/version.gitMajor=1",
        "k8s.io/component-base/version.gitMinor=34",
        "k8s.io/client-go/pkg/version.gitVersion=v1.34.4",
        "k8s.io/client-go/pkg/version.gitMajor=1",
        "k8s.io/client-go/pkg/version.gitMinor=34",
    ],
    takes: "about fifteen minutes",
};

pub(super) const ETCD: ToolSet = ToolSet {
    name: "etcd",
    packages: &[("go.etcd.io/etcd/server/v3", "etcd")],
    stamps: &[],
    takes: "a minute",
};

pub(super) const COREDNS: ToolSet =
    ToolSet { name: "coredns", packages: &[(".", "coredns")], stamps: &[], takes: "three minutes" };

/// Installs the chart; no cluster needs it to run.
pub(super) const HELM: ToolSet = ToolSet {
    name: "helm",
    packages: &[("helm.sh/helm/v3/cmd/helm", "helm")],
    stamps: &[],
    takes: "two minutes",
};

/// What stands for a pod: holds its namespaces and reaps its orphans.
pub(super) const PAUSE: ToolSet =
    ToolSet { name: "pause", packages: &[(".", "pause")], stamps: &[], takes: "a moment" };

/// A gRPC server and its client, for tests; no cluster needs them to run.
pub(super) const GRPC: ToolSet =
    ToolSet { name: "grpc", packages: &[(".", "grpc")], stamps: &[], takes: "half a minute" };

/// The programs a cluster needs, built if they are not there yet.
#[derive(Debug)]
pub(super) struct Tools {
    kubernetes: PathBuf,
    etcd: PathBuf,
    coredns: PathBuf,
    helm: PathBuf,
    pause: PathBuf,
}

impl Tools {
    pub(super) fn build() -> anyhow::Result<Self> {
        Ok(Self {
            etcd: ETCD.build()?,
            coredns: COREDNS.build()?,
            helm: HELM.build()?,
            pause: PAUSE.build()?,
            kubernetes: KUBERNETES.build()?,
        })
    }

    /// `PATH` with the cluster's own programs first.
    pub(super) fn path(&self) -> String {
        let machine = std::env::var("PATH").unwrap_or_default();
        let own =
            [&self.kubernetes, &self.etcd, &self.helm].map(|folder| folder.display().to_string());
        format!("{}:{machine}:/usr/sbin:/sbin:/usr/bin:/bin", own.join(":"))
    }

    pub(super) fn coredns(&self) -> PathBuf {
        self.coredns.join("coredns")
    }

    pub(super) fn pause(&self) -> PathBuf {
        self.pause.join("pause")
    }
}

impl ToolSet {
    /// Gives the folder with the programs. It is named for everything they are made from, so that
    /// a changed version is built again and checkouts do not disturb each other.
    pub(super) fn build(&self) -> anyhow::Result<PathBuf> {
        let module = root().join("tests/cluster").join(self.name);
        let finished = self.folder(&module)?;
        if finished.is_dir() {
            return Ok(finished);
        }
        let cache = folder();
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let lock = File::create(cache.join(format!("{}.lock", self.name)))?;
        lock.lock().context("cannot wait for another build of the same programs")?;
        if finished.is_dir() {
            return Ok(finished);
        }
        println!("building {} from Go modules, once; this takes {}", self.name, self.takes);
        let started = Instant::now();
        let staging = finished.with_extension("staging");
        if staging.exists() {
            fs::remove_dir_all(&staging)?;
        }
        fs::create_dir_all(&staging)?;
        self.compile(&module, &staging)?;
        fs::rename(&staging, &finished)?;
        println!("   built in {} s: {}", started.elapsed().as_secs(), finished.display());
        Ok(finished)
    }

    fn folder(&self, module: &Path) -> anyhow::Result<PathBuf> {
        let mut recipe = String::new();
        for name in ["go.mod", "go.sum", "main.go"] {
            let file = module.join(name);
            if file.exists() {
                recipe.push_str(&fs::read_to_string(file)?);
            }
        }
        recipe.push_str(&self.flags());
        let digest = sha256(recipe.as_bytes());
        Ok(folder().join(format!("{}-{}", self.name, &digest[..12])))
    }

    fn compile(&self, module: &Path, into: &Path) -> anyhow::Result<()> {
        let go = go::program(&folder())?;
        let go = go.to_string_lossy();
        for (package, program) in self.packages {
            // Nice: a build of this size would starve whatever else the machine does.
            let mut build = command("nice", &["-n", "15", &go, "build", "-trimpath"]);
            build.args(["-ldflags", &self.flags(), "-o"]).arg(into.join(program)).arg(package);
            run(build.env("CGO_ENABLED", "0").current_dir(module))?;
        }
        Ok(())
    }

    fn flags(&self) -> String {
        let stamps = self.stamps.iter().map(|stamp| format!(" -X {stamp}"));
        format!("-s -w{}", stamps.collect::<String>())
    }
}

/// The folder with the definitions of the Gateway API, in the release that `tests/cluster/definitions` names.
pub(super) fn definitions() -> anyhow::Result<PathBuf> {
    let go = go::program(&folder())?;
    let mut download = command(&go.to_string_lossy(), &["mod", "download", "-json"]);
    download.arg("sigs.k8s.io/gateway-api").env("GOTOOLCHAIN", "local");
    let answer = output_of(download.current_dir(root().join("tests/cluster/definitions")))?;
    let answer: serde_json::Value =
        serde_json::from_str(&answer).context("go mod download printed no JSON")?;
    let module = answer["Dir"].as_str().context("go mod download names no folder")?;
    Ok(Path::new(module).join("config/crd/standard"))
}

fn folder() -> PathBuf {
    cache().join("cluster/tools")
}
