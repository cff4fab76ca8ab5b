// Calls to the server. The key lives in this module's variable and nowhere else: not in storage, URLs or the document.

const HERE = new URL("./", document.baseURI);
// The address below which models are served: the page is at …/ui/.
export const SERVER = new URL("../", HERE).href.replace(/\/$/, "");

let key = null;

export function setKey(text) {
  key = text || null;
}

export function hasKey() {
  return key !== null;
}

export class ApiError extends Error {
  constructor(status, code, message, retryAfterS = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

// Returns the response to a request below /ui/ ("api/state") or below the server ("/v1/models"). Throws ApiError for
// every status but 2xx, and one without a status where nobody answers.
export async function ask(path, { body, signal, method } = {}) {
  const headers = new Headers();
  if (key !== null) authorize(headers);
  if (body !== undefined) headers.set("content-type", "application/json");
  const response = await reached(fetch(path.startsWith("/") ? SERVER + path : new URL(path, HERE), {
    method: method || (body === undefined ? "GET" : "POST"),
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
    credentials: "omit",
  }), "The server cannot be reached.");
  if (!response.ok) throw await errorOf(response);
  return response;
}

// A key with other characters than those of a header can be no server's, so it is refused as a server would refuse it.
function authorize(headers) {
  if (/[^\x20-\x7e\x80-\xff]/.test(key)) throw new ApiError(401, "invalid_api_key", "The key has characters that no API key has.");
  headers.set("authorization", `Bearer ${key}`);
}

// Returns what is awaited. Browsers tell by a TypeError, in words of their own, that the network failed.
async function reached(awaited, message) {
  try {
    return await awaited;
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(null, null, message) : error;
  }
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  try {
    const error = JSON.parse(text).error;
    return new ApiError(response.status, error.code || error.type || null, String(error.message), retryAfterS);
  } catch {
    return new ApiError(response.status, null, text.slice(0, 500) || response.statusText || "no text", retryAfterS);
  }
}

// Yields {event, data} for each server-sent event of a response. `onBytes` is called whenever anything comes, comments
// included.
export async function* eventsOf(response, onBytes = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reached(reader.read(), "The connection to the server broke.");
      if (done) return;
      onBytes();
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parsedEvent(block);
        if (found !== null) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsedEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
  }
  return data.length ? { event, data: data.join("\n") } : null;
}
