// End-to-end encrypted telemetry between two devices over any MQTT broker, which sees ciphertext only: the keys come from the agent of each device.
//   node telemetry.ts send    --socket AGENT.sock --key telemetry --broker mqtt://localhost --topic plant/line-1 < readings.txt
//   node telemetry.ts receive --socket AGENT.sock --key telemetry --broker mqtt://localhost --topic plant/line-1
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { connectAgent } from '@fleetkey/device-agent/client'
import { connectAsync } from 'mqtt'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { socket: { type: 'string' }, key: { type: 'string' }, broker: { type: 'string' }, topic: { type: 'string' } },
})
const { socket, key, broker, topic } = values
const [role] = positionals
if (socket === undefined || key === undefined || broker === undefined || topic === undefined || (role !== 'send' && role !== 'receive')) {
  process.stderr.write('usage: telemetry.ts send|receive --socket FILE --key KEY --broker URL --topic TOPIC\n')
  process.exit(1)
}

const agent = connectAgent(socket)
const client = await connectAsync(broker)
// A message belongs to its topic: moved to another one it does not open.
const aad = new TextEncoder().encode(topic)

if (role === 'send') {
  // Ready for every epoch at once: what is sent next is under the one in use.
  await agent.consume(key, 'telemetry-sender', () => undefined)
  for await (const line of createInterface({ input: process.stdin }))
    await client.publishAsync(topic, Buffer.from(await agent.encrypt(key, new TextEncoder().encode(line), aad)), { qos: 1 })
  await client.endAsync()
  agent.close()
} else {
  await agent.consume(key, 'telemetry-receiver', () => undefined)
  client.on('message', (_topic, payload) => {
    agent.decrypt(key, payload, { aad, once: true }).then(
      ({ epoch, plaintext }) => process.stdout.write(`${JSON.stringify({ epoch, text: new TextDecoder().decode(plaintext) })}\n`),
      (error: unknown) => process.stdout.write(`${JSON.stringify({ refused: error instanceof Error ? error.message : String(error) })}\n`),
    )
  })
  await client.subscribeAsync(topic, { qos: 1 })
  process.stdout.write(`${JSON.stringify({ listening: topic })}\n`)
}
