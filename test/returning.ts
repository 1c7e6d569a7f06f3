import { randomBytes } from 'node:crypto'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { newTlsKey, tlsCsr, type TlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install, type Board } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa, type EkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage, signMessage } from '@fleetkey/protocol/signed.ts'
import { connectProof, tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { hasIdentity, type IdentifiedDevice } from '@fleetkey/server/fleet/device.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { operator, station, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 4 << 20
const tenant = TenantId.parse('plant')

/** A TLS key with the certificate that a device got for it. */
export interface Held {
  readonly key: TlsKey
  readonly certificate: Uint8Array
}

/** One board whose messages a test sends itself, each where and when it wants to. */
export interface Device {
  readonly id: DeviceId
  readonly board: Board
  readonly attester: Attester
  /** Hello to identity; the certificate, or the refusal. */
  prove(purpose: 'enrol' | 'return', of?: { readonly attester?: Attester }): Promise<Held | BodyOf<'refusal'>>
  /** CONNECT with a certificate: `accepted`, or the public code. */
  connect(held: Held): Promise<string>
  /** Opens a session after CONNECT was accepted; what the server greets it with. */
  open(): Promise<{ readonly from: DeviceRef; readonly session: Uint8Array; readonly greeted: readonly Body[] }>
  /** One renewal request over this session, and the answer. */
  renew(
    over: { readonly from: DeviceRef; readonly session: Uint8Array },
    of?: { readonly id?: Uint8Array; readonly key?: TlsKey },
  ): Promise<BodyOf<'identity'> | BodyOf<'refusal'>>
  row(): Promise<IdentifiedDevice>
}

/** Devices of one batch, `GW-1` and so on. */
export const openDevices = async (ctx: TestContext, count = 1): Promise<readonly Device[]> => {
  const handle = deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery: 300 })
  const firmware = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))
  const ca = makeEkCa(ctx.clock.now)
  const factory = station()
  const machines = []
  for (let at = 1; at <= count; at++) machines.push({ serial: `GW-${at}`, ...(await machineOf(ctx, `GW-${at}`, ca, firmware)) })
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ca.certificate), test: true })
  await importRelease(ctx, operator(), factory.signed(referenceValues(firmware.manifest)))
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, machines)), format: 'json' })
  return machines.map((machine) => deviceOf(ctx, handle, machine))
}

const machineOf = async (ctx: TestContext, serial: string, ca: EkCa, firmware: ReturnType<typeof buildRelease>) => {
  const tpm = createSoftwareTpm({ random, now: () => ctx.clock.now })
  const ek = await personalise(tpm, ca, { random, now: ctx.clock.now })
  const board = createBoard({ serial, tpm, flash: new Flash() })
  install(board, firmware)
  board.boot()
  return { board, ek, attester: await attesterOf(board) }
}

/** The keys of a board's TPM, made anew. */
export const attesterOf = async (board: Board): Promise<Attester> => {
  const client = new Tpm(board.transport(), { random })
  return tpm2Attester(await openDeviceKeys(client, await provision(client)))
}

const deviceOf = (
  ctx: TestContext,
  handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>,
  { serial, board, attester }: { readonly serial: string; readonly board: Board; readonly attester: Attester },
): Device => {
  const id = DeviceId.parse(serial.toLowerCase())
  const heard = (client: string): Body[] => ctx.bus.take(client).map((bytes) => readMessage(bytes, { max }).envelope.body)

  return {
    id,
    board,
    attester,
    async prove(purpose, { attester: by = attester } = {}) {
      const client = EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`)
      const from = ctx.bus.connect({ client })
      const send = async (body: Body): Promise<Uint8Array> => {
        const bytes = await signMessage({ v: 1, tenant, device: client, from: 'device', id: random(16), seq: 1, body }, by.signer)
        await handle(from, bytes)
        return bytes
      }
      const hello = await by.hello({ serial, purpose, random: random(32), agent: 'test' })
      const helloBytes = await send(hello)
      const challengeBytes = ctx.bus.take(client).at(-1) ?? new Uint8Array()
      const challenge = readMessage(challengeBytes, { max }).envelope.body
      if (challenge.type === 'refusal') return challenge
      if (challenge.type !== 'challenge') throw new Error(challenge.type)
      const key = newTlsKey()
      const tls = { spki: key.spki, csr: await tlsCsr(key, serial) }
      const exporter = from.exporter ?? new Uint8Array()
      await send(await by.answer({ tenant: 'plant', hello, helloBytes, challenge, challengeBytes, exporter, eventLog: board.eventLog(), tls }))
      const body = heard(client).at(-1)
      ctx.bus.disconnect(from)
      if (body?.type === 'refusal') return body
      if (body?.type !== 'identity') throw new Error(body?.type)
      return { key, certificate: body.tls }
    },
    async connect({ certificate }) {
      const exporter = random(32)
      const proof = await attester.sign(connectProof('plant', id, certificate, exporter))
      const password = new TextEncoder().encode(Buffer.from(proof).toString('base64url'))
      const admitted = await admitConnection(ctx, { clientId: id, username: id, password, certificate, exporter, from: '127.0.0.0/24' })
      return 'refused' in admitted ? admitted.refused : 'accepted'
    },
    async open() {
      const from = ctx.bus.connect({ client: id, device: id })
      const greeted: Body[] = []
      // Its greeting ends with the approvals.
      while (greeted.at(-1)?.type !== 'approvals') {
        await new Promise((resolve) => void setTimeout(resolve, 1))
        greeted.push(...heard(id))
      }
      const [welcome] = greeted
      if (welcome?.type !== 'welcome') throw new Error(`greeted with ${welcome?.type}`)
      return { from, session: welcome.session, greeted }
    },
    async renew({ from, session }, { id: request = random(16), key = newTlsKey() } = {}) {
      const body: Body = { type: 'renew', session, csr: await tlsCsr(key, id), binding: await attester.sign(tlsBinding('plant', session, key.spki)) }
      await handle(from, await signMessage({ v: 1, tenant, device: id, from: 'device', id: request, seq: 1, body }, attester.signer))
      const answer = heard(id).at(-1)
      if (answer?.type !== 'identity' && answer?.type !== 'refusal') throw new Error(answer?.type)
      return answer
    },
    async row() {
      const row = await ctx.store.get('device', id)
      if (!hasIdentity(row)) throw new Error(`${id} is ${row?.state}`)
      return row
    },
  }
}

/** The certificate, where there was to be one. */
export const given = (answer: Held | BodyOf<'refusal'>): Held => {
  if ('code' in answer) throw new Error(`refused: ${answer.code}`)
  return answer
}
