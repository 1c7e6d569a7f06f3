import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Call } from '@fleetkey/cli/client.ts'
import type { AgentStatus } from '@fleetkey/device-agent/agent.ts'
import type { OperationName, ResponseOf } from '@fleetkey/protocol/admin.ts'
import type { DeviceEvidence } from '../invariants/evidence.ts'
import { supervise, type Supervised } from './supervised.ts'

type Order = { readonly do: string; readonly [field: string]: unknown }

const base64 = (text: string): string => Buffer.from(text).toString('base64')

/** An operator's act, repeated while the server is away; undefined where it was done before. */
type Act = <N extends OperationName>(name: N, with_?: Call<N>) => Promise<ResponseOf<N> | undefined>

/** Makes a batch of a factory known to the server, as one group with a key in software and one in the TPM. */
export const provision = async (factory: string, call: Act): Promise<void> => {
  const file = (name: string): string => readFileSync(join(factory, name), 'utf8')
  const signed = (name: string) => ({ content: base64(file(name)), signature: file(`${name}.sig`).trim(), station: 'line-1' })
  await call('station.add', { body: { id: 'line-1', publicKey: file('station.pem') } })
  await call('station.certify', { params: { id: 'line-1' }, body: { csr: base64(file('station.csr')), devices: 100 } })
  await call('endorsement.import', { body: { certificate: file('ek-ca.pem'), test: true } })
  await call('release.import', { body: signed('release.json') })
  await call('batch.import', { body: { ...signed('batch.json'), format: 'json' } })
  await call('group.create', { body: { id: 'plant' } })
  await call('group.add', { params: { id: 'plant' }, body: { batch: 'batch-1' } })
  await call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
  await call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  await call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
  await call('key.grant', { params: { id: 'command-auth' }, body: { group: 'plant' } })
}

/** Whether no rotation of these two keys waits for these boards, and the server has every statement of theirs. */
export const isSettled = async (call: Act, serials: readonly string[]): Promise<boolean> => {
  const campaigns = (await call('campaign.list'))?.items ?? []
  const isOver = campaigns.every(
    ({ counts, key, state }) =>
      state === 'aborted' ||
      ((key !== 'telemetry' || state === 'done') && (counts['pending'] ?? 0) + (counts['delivered'] ?? 0) + (counts['installed'] ?? 0) === 0),
  )
  const devices = isOver ? await Promise.all(serials.map(async (serial) => await call('device.show', { params: { id: serial.toLowerCase() } }))) : []
  return (
    isOver &&
    devices.every((view) => {
      // An epoch that was overtaken before it arrived stays delivered until the old ones are retired.
      const newest = ['telemetry', 'command-auth'].map((key) => view?.holdings.filter((one) => one.key === key).toSorted((x, y) => y.epoch - x.epoch)[0])
      // No older epoch of telemetry may be read any more: each erasure is stated. Those of command-auth stay for days.
      const erased = view?.holdings.every(
        ({ key, epoch, stage }) => key !== 'telemetry' || epoch === newest[0]?.epoch || (stage !== 'installed' && stage !== 'active'),
      )
      return erased === true && newest.every((one) => one?.stage === 'active')
    })
  )
}

/** The boards' process, switched on at each of its starts, and what it has said. */
export const openBoards = async (of: {
  readonly factory: string
  /** Path of the server's bundle. */
  readonly bundle: string
  readonly data: string
  readonly serials: readonly string[]
  readonly fault: NodeJS.ProcessEnv
}) => {
  const status = new Map<string, AgentStatus>()
  const history: { device: string; key: string; epoch: number }[] = []
  const replies = new Map<number, { resolve(value: Record<string, unknown>): void; reject(error: Error): void }>()
  let last = 0
  let process_: Supervised | undefined
  const order = (what: 'on' | 'off'): void => process_?.write(JSON.stringify({ id: 0, do: what, serials: of.serials }))
  process_ = await supervise({
    script: './fleet-process.ts',
    args: [of.factory, of.bundle, of.data],
    fault: of.fault,
    isReady: (line) => line === '{"event":"ready"}',
    onReady: () => {
      status.clear()
      // The first start is switched on below, once `process_` is there.
      order('on')
    },
    onLine(line) {
      const message = JSON.parse(line) as { event?: string; serial?: string; reply?: number; error?: { message: string } } & AgentStatus
      if (message.event === 'status' && message.serial !== undefined) {
        status.set(message.serial, message)
        for (const [key, epoch] of Object.entries(message.current)) history.push({ device: message.serial, key, epoch })
      }
      if (typeof message.reply !== 'number') return
      const waiting = replies.get(message.reply)
      replies.delete(message.reply)
      if (message.error === undefined) waiting?.resolve({ ...message })
      else waiting?.reject(new Error(message.error.message))
    },
  })
  order('on')
  const started = process_
  const ask = async (question: Order): Promise<Record<string, unknown>> => {
    const id = ++last
    return await new Promise((resolve, reject) => {
      replies.set(id, { resolve, reject })
      started.write(JSON.stringify({ id, ...question }))
    })
  }
  return {
    process: started,
    status,
    history,
    powerCycle() {
      for (const what of ['off', 'on'] as const) order(what)
    },
    /** While it hangs it keeps its connections and reads nothing. */
    hang(is: boolean) {
      process.kill(started.pid, is ? 'SIGSTOP' : 'SIGCONT')
    },
    evidence: (serial: string): DeviceEvidence => ({
      device: serial.toLowerCase(),
      status: status.get(serial) as AgentStatus,
      encrypt: async (key, plaintext) => String((await ask({ do: 'encrypt', serial, key, data: base64(plaintext) }))['data']),
      decrypt: async (key, ciphertext) => Buffer.from(String((await ask({ do: 'decrypt', serial, key, data: ciphertext }))['data']), 'base64').toString(),
      mac: async (key, text) => (await ask({ do: 'mac', serial, key, data: base64(text) })) as { epoch: number; mac: string },
      verify: async (key, epoch, text, mac) => (await ask({ do: 'verify', serial, key, epoch, data: base64(text), mac }))['valid'] === true,
    }),
  }
}

export type Boards = Awaited<ReturnType<typeof openBoards>>
