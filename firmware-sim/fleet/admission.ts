import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Refused, type Client } from '@fleetkey/cli/client.ts'
import { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'

/** What the folder of a factory says of its batch. */
const batchIn = (folder: string): { batch: string; station: string; serials: readonly string[] } => {
  const { batch, station, rows } = JSON.parse(readFileSync(join(folder, 'batch.json'), 'utf8')) as {
    batch: string
    station: string
    rows: readonly { serial: string }[]
  }
  return { batch, station, serials: rows.map(({ serial }) => serial) }
}

/** Runs `call`; true when the server has it already. */
const already = async (call: () => Promise<unknown>): Promise<boolean> => {
  try {
    await call()
    return false
  } catch (error) {
    if (error instanceof Refused && error.code === 'conflict') return true
    throw error
  }
}

const isKnown = async (client: Client, batch: string): Promise<boolean> => {
  try {
    await client.call('batch.show', { params: { id: batch } })
    return true
  } catch (error) {
    if (error instanceof Refused && error.code === 'not-found') return false
    throw error
  }
}

/**
 * Hands a factory's batch to a server as its station and an owner would: station key, the simulator's CA as a test endorsement, release, manifest; and makes the
 * boards members of a group. Harmless to repeat. Throws Refused when the token may not, or the server has another batch of that name.
 */
export const admitBatch = async (client: Client, folder: string, group: string | undefined): Promise<void> => {
  const { batch, station, serials } = batchIn(folder)
  const text = (name: string): string => readFileSync(join(folder, name), 'utf8')
  const signed = (name: string): { content: string; signature: string; station: string } => ({
    content: Buffer.from(text(name)).toString('base64'),
    signature: text(`${name}.sig`).trim(),
    station,
  })
  if (!(await isKnown(client, batch))) {
    await already(async () => await client.call('station.add', { body: { id: station, publicKey: text('station.pem') } }))
    await already(async () => await client.call('endorsement.import', { body: { certificate: text('ek-ca.pem'), test: true } }))
    await already(async () => await client.call('release.import', { body: signed('release.json') }))
    await client.call('batch.import', { body: { ...signed('batch.json'), format: 'json' } })
  }
  if (group === undefined) return
  const id = GroupId.parse(group)
  await already(async () => await client.call('group.create', { body: { id } }))
  for (let start = 0; start < serials.length; start += 1_000) {
    const devices = serials.slice(start, start + 1_000).map((serial) => DeviceId.parse(serial.toLowerCase()))
    await client.call('group.add', { params: { id }, body: { devices } })
  }
}
