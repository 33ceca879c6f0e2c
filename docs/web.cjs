// Greedy decoding of an exported folder under onnxruntime-web: npm install onnxruntime-web; node docs/web.cjs FOLDER 40 1 50 60
// (how many tokens, then the prompt's ids). A page does the same with fetch() in place of fs and `ort` from a <script>.
const fs = require("node:fs");
const ort = require("onnxruntime-web");

async function main(folder, count, prompt) {
  const read = (name) => new Uint8Array(fs.readFileSync(`${folder}/${name}`));
  const config = JSON.parse(fs.readFileSync(`${folder}/config.json`));
  ort.env.wasm.numThreads = 1; // a page may take more where it is cross-origin isolated
  const session = await ort.InferenceSession.create(read("model.onnx"), {
    executionProviders: ["wasm"], // or ["webgpu", "wasm"] in a browser that has it
    externalData: [{ path: "model.onnx.data", data: read("model.onnx.data") }],
  });
  const size = config.head_dim ?? config.hidden_size / config.num_attention_heads;
  const heads = config.num_key_value_heads ?? config.num_attention_heads;
  const feeds = {};
  for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values.")))
    feeds[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
  let fresh = prompt;
  let total = 0;
  const answer = [];
  while (answer.length < count) {
    total += fresh.length;
    feeds.input_ids = new ort.Tensor("int64", BigInt64Array.from(fresh.map(BigInt)), [1, fresh.length]);
    feeds.attention_mask = new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]);
    const found = await session.run(feeds);
    const last = found.logits.data.slice(-found.logits.dims[2]);
    fresh = [last.indexOf(Math.max(...last))];
    answer.push(fresh[0]);
    for (const name of session.outputNames.filter((name) => name.startsWith("present.")))
      feeds[name.replace("present", "past_key_values")] = found[name];
  }
  console.log(JSON.stringify(answer));
}

const [folder, count, ...prompt] = process.argv.slice(2);
main(folder, Number(count), prompt.map(Number));
