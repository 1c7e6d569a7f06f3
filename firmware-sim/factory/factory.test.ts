import { createHash, createPublicKey, randomBytes, verify, X509Certificate } from 'node:crypto'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { requestOfFile } from '@fleetkey/protocol/x509/request/structure.ts'
import { alg, ekCertificateIndex } from '@fleetkey/tpm2/constants.ts'
import { parseEventLog, replay } from '@fleetkey/tpm2/event-log.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { install, type Board } from '../board/board.ts'
import { buildRelease, referenceValues, simulatedImages, stages, type Release } from '../release/release.ts'
import { makeBatch, openFactory, writeBatch, type Batch } from './factory.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const now = (): number => Date.now()
const folder = mkdtempSync(join(tmpdir(), 'fk-factory-'))
const text = (name: string): string => readFileSync(join(folder, name), 'utf8')
let batch: Batch
/** They all have a TPM. */
const boards = () => batch.boards.flatMap(({ serial, ek, tpm }) => (ek === undefined || tpm === undefined ? [] : [{ serial, ek, tpm }]))

beforeAll(async () => {
  batch = await makeBatch({ batch: 'b7', model: 'gateway', station: 'line-1', devices: 3, release: { name: '1.0.0', number: 1 } }, { random, now })
  await writeBatch(folder, batch)
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

describe('what a factory hands over', () => {
  test.each(['batch.json', 'batch.csv', 'release.json'])('%s is signed by the station, byte for byte', (name) => {
    const key = createPublicKey(text('station.pem'))
    const signature = Buffer.from(text(`${name}.sig`), 'base64')
    const content = readFileSync(join(folder, name))
    expect(verify('sha256', content, key, signature)).toBe(true)
    content[9] = (content[9] ?? 0) ^ 1
    expect(verify('sha256', content, key, signature)).toBe(false)
  })

  test('the station asks for a certificate with the key that it signs with', () => {
    const { spki, commonName } = judgeRequest(requestOfFile(readFileSync(join(folder, 'station.csr'))))
    expect(commonName).toBe('line-1')
    expect(Buffer.from(spki)).toEqual(createPublicKey(text('station.pem')).export({ format: 'der', type: 'spki' }))
  })

  test('JSON and CSV name the same boards: serial, hash of the EK, model', () => {
    const { rows, ...head } = JSON.parse(text('batch.json')) as { rows: { serial: string; ek: string }[] }
    expect(head).toEqual({ format: 'fleetkey/batch/1', batch: 'b7', model: 'gateway', station: 'line-1' })
    expect(rows).toEqual(boards().map(({ serial, ek }) => ({ serial, ek: createHash('sha256').update(ek).digest('hex') })))
    const [heading, ...lines] = text('batch.csv').trimEnd().split('\r\n')
    expect(heading).toBe('serial,ek,model,device')
    expect(lines).toEqual(rows.map(({ serial, ek }) => `${serial},${ek},gateway,${serial.toLowerCase()}`))
    expect(new Set(rows.map(({ ek }) => ek)).size).toBe(3)
  })

  test('each TPM carries a certificate of the EK CA for its own EK', async () => {
    const ca = new X509Certificate(text('ek-ca.pem'))
    for (const { tpm, ek } of boards()) {
      const client = new Tpm(tpm.transport(), { random })
      await client.startup()
      const der = await client.nvRead(ekCertificateIndex.ecc)
      const certificate = new X509Certificate(Buffer.from(der ?? []))
      expect([certificate.verify(ca.publicKey), certificate.checkIssued(ca), certificate.ca]).toEqual([true, true, false])
      expect(certificate.publicKey.export({ format: 'der', type: 'spki' })).toEqual(Buffer.from(spkiOf(ek)))
    }
  })

  test('what must stay in the factory is for its owner only; a batch is never written over', async () => {
    for (const name of ['station.key', 'ek-ca.key', ...readdirSync(join(folder, 'boards')).map((board) => `boards/${board}`)])
      expect([name, statSync(join(folder, name)).mode & 0o777]).toEqual([name, 0o600])
    await expect(writeBatch(folder, batch)).rejects.toThrow(/EEXIST/)
  })
})

describe('a boot', () => {
  const predicted = (release: Release): Readonly<Record<string, string>> =>
    (JSON.parse(referenceValues(release.manifest)) as { pcrs: Record<string, string> }).pcrs
  const measured = async (board: Board): Promise<Readonly<Record<string, string>>> => {
    const client = new Tpm(board.transport(), { random })
    await client.startup()
    const values = await client.pcrRead(alg.sha256, [0, 1, 2, 3, 4, 5, 6, 7, 11])
    return Object.fromEntries([...values].map(([pcr, value]) => [String(pcr), Buffer.from(value).toString('hex')]))
  }
  const board = async (): Promise<Board> => await (await openFactory(folder)).board(batch.boards[0]?.serial ?? '', { random, now })
  const flip = (bytes: Uint8Array): Uint8Array => bytes.map((byte, at) => (at === 100 ? byte ^ 1 : byte))

  test('has the PCRs that were computed from the manifest alone, each time it is switched on', async () => {
    const one = await board()
    for (let boot = 0; boot < 2; boot++) {
      one.boot()
      expect(await measured(one)).toEqual(predicted(batch.release))
    }
    expect(JSON.parse(text('release.json'))).toMatchObject({ format: 'fleetkey/release/1', pcrs: predicted(batch.release) })
  })

  test('its event log replays to the same PCRs', async () => {
    const one = await board()
    one.boot()
    const replayed = replay(parseEventLog(one.eventLog(), { maxEvents: 100, maxBytes: 10_000 }), alg.sha256)
    const wanted = await measured(one)
    expect(Object.keys(wanted)).toHaveLength(9)
    for (const [pcr, value] of Object.entries(wanted)) expect([pcr, Buffer.from(replayed.get(Number(pcr)) ?? []).toString('hex')]).toEqual([pcr, value])
  })

  test.each(stages)('one changed bit in $stage changes PCR $pcr and no other', async ({ stage, pcr }) => {
    const one = await board()
    one.flash.tamper(stage, flip)
    one.boot()
    const [wanted, got] = [predicted(batch.release), await measured(one)]
    expect(Object.keys(wanted).filter((name) => wanted[name] !== got[name])).toEqual([String(pcr)])
  })

  test('after an update it has those of the new release', async () => {
    const one = await board()
    one.boot()
    const next = buildRelease({ model: 'gateway', name: '1.1.0', number: 2 }, simulatedImages('gateway/1.1.0', random(100)))
    install(one, next)
    expect(await measured(one)).toEqual(predicted(batch.release))
    one.boot()
    expect(await measured(one)).toEqual(predicted(next))
    expect(predicted(next)).not.toEqual(predicted(batch.release))
  })
})
