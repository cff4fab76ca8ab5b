// One chat request: its body, its stream, and the same as curl and Python. Nothing here touches the page.

import { SERVER, ask, eventsOf } from "./api.js";

const PATH = "/v1/chat/completions";
// Arguments of OpenAI's client. It takes all other fields of a request as `extra_body`.
const OF_OPENAI = new Set([
  "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "tools", "tool_choice",
  "response_format", "stop", "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "logit_bias",
]);

// How a Python program prints the calls of tools: the name, and then the arguments as they come.
const CALLS =
  "        for call in choice.delta.tool_calls or []:\n            name = f\"\\n{call.function.name} \" if call.function.name else \"\"\n" +
  "            print(name + (call.function.arguments or \"\"), end=\"\", flush=True)\n";

// Returns {body, problem} for what a pane has. `problem` names the field that cannot be read, or is empty.
export function requestOf(parameters, messages) {
  const body = { model: parameters.model, messages: [...messages], stream: true, stream_options: { include_usage: true } };
  if (parameters.system.trim()) body.messages.unshift({ role: "system", content: parameters.system });
  for (const [name, low, high] of [["temperature", 0, 2], ["top_p", 0, 1], ["max_tokens", 1, Infinity], ["seed", -Infinity, Infinity]]) {
    const text = String(parameters[name]).trim();
    if (text === "") continue;
    const value = Number(text);
    const isWhole = name === "max_tokens" || name === "seed";
    if (!Number.isFinite(value) || value < low || value > high || (isWhole && !Number.isInteger(value))) {
      return { body, problem: `${name} must be ${isWhole ? "a whole number" : `a number from ${low} to ${high}`}, and it is "${text}".` };
    }
    body[name] = value;
  }
  for (const [name, isRight, form] of [["tools", Array.isArray, "a list"], ["response_format", isObject, "an object"], ["more", isObject, "an object"]]) {
    const text = parameters[name].trim();
    if (text === "") continue;
    const label = name === "more" ? "More fields" : name;
    let value;
    try {
      value = JSON.parse(text);
    } catch (error) {
      return { body, problem: `${label} is not valid JSON: ${error.message}` };
    }
    if (!isRight(value)) return { body, problem: `${label} must be ${form} in JSON.` };
    Object.assign(body, name === "more" ? value : { [name]: value });
  }
  return { body, problem: "" };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export function emptyAnswer() {
  return {
    content: "", reasoning: "", toolCalls: [], usage: null, finish: null, error: null, timing: null,
    began: performance.now(), first: null, ended: null, wasStopped: false,
  };
}

// Streams the answer to `body` into `answer`, and calls `onChange` after each piece. It returns when the answer has ended,
// was stopped by `signal`, or has failed: it throws nothing.
export async function stream(body, answer, signal, onChange) {
  try {
    const response = await ask(PATH, { body, signal });
    answer.timing = timingOf(response.headers.get("server-timing"));
    onChange();
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        answer.error = { status: chunk.error.status || null, code: chunk.error.code || chunk.error.type, message: String(chunk.error.message) };
        break;
      }
      take(answer, chunk);
      onChange();
    }
  } catch (error) {
    if (signal.aborted) answer.wasStopped = true;
    else answer.error = error;
  }
  answer.ended = performance.now();
  onChange();
}

function take(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta || {};
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  if (delta.content || reasoning || delta.tool_calls?.length) answer.first ??= performance.now();
  answer.content += delta.content ?? "";
  answer.reasoning += reasoning;
  for (const call of delta.tool_calls || []) {
    const kept = (answer.toolCalls[call.index ?? 0] ??= { id: "", name: "", arguments: "", result: "" });
    kept.id ||= call.id || "";
    kept.name += call.function?.name ?? "";
    kept.arguments += call.function?.arguments ?? "";
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

// Returns {router, queue, engine} in milliseconds, or null if the header has none of them.
export function timingOf(header) {
  const found = {};
  for (const part of (header || "").split(",")) {
    const match = /^\s*(router|queue|engine);dur=([\d.]+)/.exec(part);
    if (match) found[match[1]] = Number(match[2]);
  }
  return Object.keys(found).length ? found : null;
}

// Returns tokens per second after the first one, or null if they cannot be told.
export function speedOf({ usage, first, ended }) {
  const tokens = (usage?.completion_tokens ?? 0) - 1;
  return tokens > 0 && first !== null && ended !== null && ended > first ? (1000 * tokens) / (ended - first) : null;
}

// Returns the messages of a turn: the question, the answer, and the results of the tools that it has called.
export function messagesOf({ question, answer }) {
  const messages = question === null ? [] : [{ role: "user", content: question }];
  if (!answer || answer.error) return messages;
  const calls = answer.toolCalls.filter(Boolean);
  const said = { role: "assistant", content: answer.content || (calls.length ? null : "") };
  if (calls.length) {
    said.tool_calls = calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  }
  return [...messages, said, ...calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result }))];
}

export function asCurl(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return (
    `curl -N ${SERVER}${PATH} \\\n  -H 'content-type: application/json' \\\n  -H 'authorization: Bearer KEY' \\\n` +
    `  -d '${quoted}'\n`
  );
}

export function asPython(body) {
  const known = Object.entries(body).filter(([name]) => OF_OPENAI.has(name));
  const more = Object.entries(body).filter(([name]) => !OF_OPENAI.has(name));
  if (more.length) known.push(["extra_body", Object.fromEntries(more)]);
  const fields = known.map(([name, value]) => `    ${name}=${pythonOf(value, 4)},\n`);
  return (
    `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${SERVER}/v1`)}, api_key="KEY")\n` +
    `stream = client.chat.completions.create(\n${fields.join("")})\nfor chunk in stream:\n    for choice in chunk.choices:\n` +
    `        print(choice.delta.content or "", end="", flush=True)\n${"tools" in body ? CALLS : ""}print()\n`
  );
}

// Returns a value of JSON as Python writes it.
function pythonOf(value, indent) {
  const inner = " ".repeat(indent + 4);
  const end = " ".repeat(indent);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) {
    return value.length ? `[\n${value.map((each) => `${inner}${pythonOf(each, indent + 4)},\n`).join("")}${end}]` : "[]";
  }
  if (isObject(value)) {
    const lines = Object.entries(value).map(([name, each]) => `${inner}${JSON.stringify(name)}: ${pythonOf(each, indent + 4)},\n`);
    return lines.length ? `{\n${lines.join("")}${end}}` : "{}";
  }
  return JSON.stringify(value);
}
