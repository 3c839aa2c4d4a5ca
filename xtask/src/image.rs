//! `cargo xtask image`: the programs as OCI images, without a container engine.
//!
//! An image holds its programs, the libraries they are linked with, and a bill of materials; no shell, no package manager.

mod sbom;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use crate::command::{command, quietly, root, run};
use crate::oci::{self, Image, runtime};
use crate::run::target_dir;
use crate::setup;

/// What is built.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Registry and repository folder in the images' names.
    #[arg(long, default_value = "culvert.dev")]
    registry: String,
    /// Tag of the images; default: the version.
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Optimised programs.
    #[arg(long)]
    release: bool,
    /// Use the programs as they are built already.
    #[arg(long)]
    no_build: bool,
    /// Where the archive goes; default: `target/images/culvert.tar`.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// The plugin's package and program.
const PLUGIN: &str = "culvert-cni";

/// Its name, package, programs, and user; the first program is the entry point.
struct Recipe {
    name: &'static str,
    packages: &'static [&'static str],
    programs: &'static [&'static str],
    /// The profile of its optimised programs, if it is not `release`.
    profile: Option<&'static str>,
    /// Whether the node's plugin is in it.
    plugin: bool,
    user: &'static str,
    title: &'static str,
}

const RECIPES: &[Recipe] = &[
    Recipe {
        name: "culvert-agent",
        packages: &["culvert-agent", PLUGIN, "culvert"],
        programs: &["culvert-agent", "culvert"],
        profile: None,
        plugin: true,
        // Enters other namespaces.
        user: "0:0",
        title: "Culvert's per-node agent, with the CNI plugin it installs",
    },
    Recipe {
        name: "culvert-controller",
        packages: &["mesh-controller", "culvert"],
        programs: &["culvert-controller", "culvert"],
        profile: None,
        plugin: false,
        user: "65532:65532",
        title: "Culvert's controller",
    },
    Recipe {
        name: "culvert-waypoint",
        packages: &["culvert-waypoint"],
        programs: &["culvert-waypoint"],
        profile: Some("waypoint"),
        plugin: false,
        user: "65532:65532",
        title: "Culvert's waypoint, the L7 proxy",
    },
    Recipe {
        name: "culvert",
        packages: &["culvert"],
        programs: &["culvert"],
        profile: None,
        plugin: false,
        user: "65532:65532",
        title: "Culvert's command line",
    },
];

pub(crate) fn image(options: &Options) -> anyhow::Result<()> {
    if !options.no_build {
        setup::ensure()?;
        // As for the tests: fewer packages would ask dependencies for other features, and build them again.
        let mut build = command("cargo", &["build", "--workspace", "--bins"]);
        if options.release {
            build.arg("--release");
        }
        run(&mut build)?;
        for recipe in RECIPES.iter().filter(|_| options.release) {
            let Some(profile) = recipe.profile else { continue };
            let mut build = command("cargo", &["build", "--profile", profile, "--bins"]);
            for package in recipe.packages {
                build.args(["--package", package]);
            }
            run(&mut build)?;
        }
    }
    let target = target_dir()?;
    let plugin = static_plugin(&target, options.release)?;
    let folder = target.join("images");
    let stripped = folder.join("stripped");
    fs::create_dir_all(&stripped).with_context(|| format!("cannot make {}", stripped.display()))?;
    let mut images = Vec::new();
    for recipe in RECIPES {
        let bill = sbom::cyclonedx(recipe.packages)?;
        fs::write(folder.join(format!("{}.cdx.json", recipe.name)), &bill)?;
        let mut image = make(recipe, options, &target, &stripped, bill)?;
        if recipe.plugin {
            let small = strip(&plugin, &stripped)?;
            image.files.insert(format!("/usr/local/bin/{PLUGIN}"), small);
        }
        images.push(image);
    }
    let output = options.output.clone().unwrap_or_else(|| folder.join("culvert.tar"));
    oci::write(&output, &images)?;
    let bytes = fs::metadata(&output)?.len();
    println!("{} ({} MB): {}", output.display(), bytes / 1_000_000, names(&images));
    Ok(())
}

fn make(
    recipe: &Recipe,
    options: &Options,
    target: &Path,
    stripped: &Path,
    bill: String,
) -> anyhow::Result<Image> {
    let profile = if options.release { recipe.profile.unwrap_or("release") } else { "debug" };
    let built = target.join(profile);
    let mut files = BTreeMap::new();
    for program in recipe.programs {
        let source = built.join(program);
        let small = strip(&source, stripped)?;
        files.extend(runtime::libraries(&source)?);
        files.insert(format!("/usr/local/bin/{program}"), small);
    }
    let label =
        |key: &str, value: &str| (format!("org.opencontainers.image.{key}"), value.to_owned());
    Ok(Image {
        name: format!("{}/{}:{}", options.registry, recipe.name, options.tag),
        entrypoint: vec![format!("/usr/local/bin/{}", recipe.programs[0])],
        user: recipe.user.to_owned(),
        files,
        texts: BTreeMap::from([("/usr/share/culvert/sbom.cdx.json".to_owned(), bill)]),
        // Runtimes name namespaces by the old path.
        links: BTreeMap::from([("/var/run".to_owned(), "../run".to_owned())]),
        folders: ["/etc", "/proc", "/run", "/sys", "/tmp", "/var/lib"]
            .map(str::to_owned)
            .into_iter()
            .collect::<BTreeSet<_>>(),
        labels: BTreeMap::from([
            label("title", recipe.title),
            label("version", &options.tag),
            label("licenses", "Apache-2.0"),
            label("revision", &revision()),
        ]),
    })
}

/// The plugin without a need for anything of the node it is installed on. Built in a folder of its own, because few of its
/// dependencies are asked for the same as by the whole workspace.
fn static_plugin(target: &Path, release: bool) -> anyhow::Result<PathBuf> {
    let folder = target.join("static");
    let mut build = command("cargo", &["rustc", "-p", PLUGIN, "--target-dir"]);
    build.arg(&folder);
    if release {
        build.arg("--release");
    }
    run(build.args(["--", "-C", "target-feature=+crt-static"]))?;
    Ok(folder.join(if release { "release" } else { "debug" }).join(PLUGIN))
}

fn strip(program: &Path, into: &Path) -> anyhow::Result<PathBuf> {
    let small = into.join(program.file_name().context("a program has a name")?);
    quietly(command("strip", &["-o"]).arg(&small).arg(program))?;
    Ok(small)
}

/// The commit, where it is known.
fn revision() -> String {
    let mut git = command("git", &["rev-parse", "HEAD"]);
    crate::command::output_of(git.current_dir(root()))
        .map_or_else(|_no_repository| "unknown".to_owned(), |commit| commit.trim().to_owned())
}

fn names(images: &[Image]) -> String {
    images.iter().map(|image| image.name.as_str()).collect::<Vec<_>>().join(", ")
}
