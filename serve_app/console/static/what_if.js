// What if: whether a model, or a whole config, would fit beside what runs, and the smallest change that makes it fit.

import { Component, html } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { Bar, Legend } from "./bar.js";
import { bytes } from "./format.js";
import { isGpu, scaleOf } from "./layout.js";
import { Choice, Copy, Problem, download } from "./widgets.js";

const FIELDS = [
  ["infer_backend", "Backend", ["", "auto", "vllm", "pt"]],
  ["num_gpus", "GPUs", "number"],
  ["tensor_parallel_size", "Tensor parallel size", "number"],
  ["max_model_len", "Longest text in tokens", "number"],
  ["max_num_seqs", "Requests at once", "number"],
  ["max_memory", "Memory limits", "text"],
  ["quantization", "Quantisation", "text"],
  ["dtype", "Data type", ["", "auto", "bfloat16", "float16", "float32"]],
];
const OF_GPUS = new Set(["num_gpus", "max_memory"]);
const EXAMPLE = "applications:\n- name: qwen\n  import_path: serve_app.app:model\n  route_prefix: /models/qwen\n  args:\n    model: Qwen/Qwen2.5-7B-Instruct\n    infer_backend: auto\n    max_model_len: 8192\n";
const PARTS = { weights: "weights_bytes", kv_cache: "kv_cache_bytes", adapters: "adapters_bytes", activations: "activation_bytes" };

export class WhatIf extends Component {
  constructor(props) {
    super(props);
    this.state = { form: "model", fields: { model: "" }, yaml: "", answer: null, error: null, isBusy: false, width: 0 };
    this.measure = () => {
      const width = Math.floor(this.box?.clientWidth ?? 0);
      if (width && width !== this.state.width) this.setState({ width });
    };
    this.observer = new ResizeObserver(this.measure);
    this.hold = (box) => {
      if (this.box) this.observer.unobserve(this.box);
      this.box = box;
      if (box) this.observer.observe(box);
    };
  }

  componentWillUnmount() {
    this.controller?.abort();
    this.observer.disconnect();
  }

  async plan(event) {
    event.preventDefault();
    this.controller?.abort();
    const controller = new AbortController();
    this.controller = controller;
    this.setState({ isBusy: true, error: null, answer: null });
    try {
      const answer = await (await ask("api/plan", { body: this.body(), signal: controller.signal })).json();
      this.setState({ answer, isBusy: false });
    } catch (error) {
      if (this.controller === controller) this.setState({ error: controller.signal.aborted ? null : error, isBusy: false });
    }
  }

  body() {
    const { form, fields, yaml } = this.state;
    if (form === "yaml") return { yaml };
    const body = { model: fields.model.trim() };
    for (const [name, , kind] of fieldsOf(this.props.state.nodes)) {
      const text = (fields[name] ?? "").trim();
      if (text === "") continue;
      body[name] = kind === "number" && /^\d+(\.\d+)?$/.test(text) ? Number(text) : name === "max_memory" ? jsonOr(text) : text;
    }
    return body;
  }

  render({ state }, { form, fields, yaml, answer, error, isBusy, width }) {
    if (!(state.access.may_plan ?? state.access.is_admin)) return html`<h2>What if</h2><p>${refusalOf(state.access)}</p>`;
    const kinds = fieldsOf(state.nodes);
    const set = (name) => (event) => this.setState({ fields: { ...this.state.fields, [name]: event.target.value } });
    const isReady = form === "yaml" ? yaml.trim() : fields.model.trim();
    return html`<div class="bar-row">
        <h2>What if</h2>
        <${Choice} label="What to plan" value=${form} options=${[["model", "A model"], ["yaml", "A config file"]]} onChange=${(to) => this.setState({ form: to })} />
        <span class="dim">The plan is made for this cluster, beside what runs. It starts nothing.</span>
      </div>
      <form class="panel what-if" onSubmit=${(event) => this.plan(event)}>
        ${form === "model"
          ? html`<label class="wide">Model: an id of the hub, or a folder on the server
              <input type="text" value=${fields.model} onInput=${set("model")} placeholder="Qwen/Qwen2.5-7B-Instruct" spellcheck=${false} /></label>
            <div class="fields">${kinds.map(([name, label, kind]) => html`<label>${label}${field(name, kind, fields, set)}</label>`)}</div>
            ${kinds !== FIELDS && html`<p class="note">This cluster has no GPU, so the model is planned for the CPU.</p>`}`
          : html`<label class="wide">Config file (YAML)
              <textarea rows="12" class="mono" value=${yaml} spellcheck=${false} placeholder=${EXAMPLE}
                onInput=${(event) => this.setState({ yaml: event.target.value })}></textarea></label>`}
        <div class="row">
          <button type="submit" class="primary" disabled=${isBusy || !isReady}>${isBusy ? "Planning…" : "Plan"}</button>
          ${isBusy && html`<button type="button" onClick=${() => this.controller.abort()}>Cancel</button>`}
          <span class="note">${isBusy ? "A plan takes up to a minute." : ""}</span>
        </div>
      </form>
      <div aria-live="polite"><${Problem} error=${error} />${answer && html`<${Verdict} answer=${answer} />`}</div>
      ${answer && html`<${Result} answer=${answer} width=${width} hold=${this.hold} />`}`;
  }
}

function refusalOf({ is_admin: isAdmin }) {
  const who = isAdmin ? "Only an admin of all models may plan" : "Only a key of the role admin may plan";
  return `${who}, because a plan names all models and reads folders of the server.`;
}

// Returns the fields that a plan for this cluster can have. Before any node is known, it may have GPUs.
function fieldsOf(nodes) {
  const devices = nodes.flatMap((node) => node.devices);
  return devices.length && !devices.some(isGpu) ? FIELDS.filter(([name]) => !OF_GPUS.has(name)) : FIELDS;
}

function field(name, kind, fields, set) {
  if (Array.isArray(kind)) {
    return html`<select value=${fields[name] ?? ""} onChange=${set(name)}>${kind.map((each) => html`<option value=${each}>${each || "not set"}</option>`)}</select>`;
  }
  const hint = name === "max_memory" ? '{"0": "10GiB"}' : "";
  return html`<input type="text" inputmode=${kind === "number" ? "decimal" : "text"} placeholder=${hint} value=${fields[name] ?? ""} onInput=${set(name)} spellcheck=${false} />`;
}

function jsonOr(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function Verdict({ answer }) {
  return html`<p class=${`verdict ${answer.fits ? "good" : "bad"}`}>
    <strong>${answer.fits ? "It fits." : "It does not fit."}</strong>
    ${" "}${answer.fits ? "Everything has a place beside what runs." : answer.fixes?.length ? "These changes make it fit." : "The text says what is missing."}
  </p>`;
}

function Result({ answer, width, hold }) {
  const devices = devicesOf(answer.plan);
  const scale = scaleOf(devices);
  return html`${answer.notes?.length > 0 && html`<ul class="panel notes" aria-label="Notes">${answer.notes.map((note) => html`<li>${note}</li>`)}</ul>`}
    ${answer.fixes?.length > 0 && html`<section class="panel"><h3>The smallest fixes</h3>
      <ul class="fixes">${answer.fixes.map((fix) => html`<li><strong>${fix.model}</strong> <code>${fix.text}</code>${fix.effect && html` <span class="dim">${fix.effect}</span>`}</li>`)}</ul></section>`}
    ${devices.length > 0 && html`<section class="panel">
      <h3>Where it would be</h3>
      <${Legend} isPlan=${true} />
      <div class="plan-map">
        ${devices.map((device) => html`<div class="device">
          <div class="what"><strong>${device.title}</strong> <span class="dim">${device.name}</span></div>
          <div class="cell" ref=${device === devices[0] ? hold : null}>${width > 0 && html`<${Bar} device=${device} scale=${scale} width=${width} isPlan=${true} />`}</div>
          <div class="figures num">${bytes(device.free)} <span class="dim">left of ${bytes(device.total)}</span></div>
        </div>`)}
      </div>
    </section>`}
    <section class="panel">
      <header class="row"><h3 class="grow">The plan</h3><${Copy} text=${answer.text} /></header>
      <pre class="code lines" tabindex="0" role="region" aria-label="The plan">${answer.text}</pre>
    </section>
    ${answer.yaml && html`<section class="panel">
      <header class="row"><h3 class="grow">The config with what the plan chose</h3><${Copy} text=${answer.yaml} />
        <button type="button" class="small" onClick=${() => download("serve-app.yaml", answer.yaml)}>Download</button></header>
      <pre class="code lines" tabindex="0" role="region" aria-label="Config">${answer.yaml}</pre>
    </section>`}`;
}

// Returns the devices of a plan in the form of the state's, with what each model would take. What is in use now, or kept
// for what runs, counts as foreign.
function devicesOf(plan) {
  return (plan?.gpus || []).map((gpu) => {
    const blocks = (plan.models || []).flatMap((model) => model.ranks.filter((rank) => rank.gpu === gpu.id).map((rank) => blockOf(model, rank)));
    const foreign = Math.max(0, gpu.total_bytes - gpu.free_bytes);
    const [node, index] = splitId(gpu.id);
    return {
      device: index === "cpu" ? "cpu" : gpu.id, index: index === "cpu" ? null : index, name: index === "cpu" ? "" : gpu.name,
      title: `${node} ${index === "cpu" ? "memory" : `GPU ${index}`}`,
      total: gpu.total_bytes, foreign, used: foreign, free: gpu.spare_bytes, blocks,
    };
  });
}

function splitId(id) {
  const at = id.lastIndexOf(":");
  return at < 0 ? ["", id] : [id.slice(0, at), id.slice(at + 1)];
}

function blockOf(model, rank) {
  const parts = Object.entries(PARTS).map(([name, field]) => ({ name, planned: rank[field] ?? 0, held: null, certainty: rank.certainty?.[name] }));
  const context = (rank.context_bytes ?? 0) + (rank.graph_bytes ?? 0);
  parts.push({ name: "context", planned: context, held: null, certainty: rank.certainty?.context });
  return { model: model.name, replica: "", rank: 0, planned: rank.share_bytes, held: null, peak: null, certainty: rank.certainty?.share, parts };
}
