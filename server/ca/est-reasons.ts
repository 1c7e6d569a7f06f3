import { Problem, type ProblemCode } from '@fleetkey/protocol/problem.ts'

/** Why an EST request is refused (RFC 7030). `status`: the HTTP status, where it is another than that of the code. */
interface EstReason {
  readonly code: ProblemCode
  readonly status?: number
  readonly meaning: string
  readonly remedy: string
}

/** The one table of reasons of EST; docs/protocol.md has it too. Those of tokens, manifests, IDevIDs and requests are in theirs. */
export const estReasons = {
  'est.path': {
    code: 'not-found',
    meaning: 'No such operation.',
    remedy: 'cacerts, simpleenroll, simplereenroll, csrattrs; labels and serverkeygen are not offered.',
  },
  'est.method': {
    code: 'unsupported',
    status: 405,
    meaning: 'The operation is not asked for by this method.',
    remedy: 'GET for cacerts and csrattrs, POST for enrolment.',
  },
  'est.content-type': { code: 'unsupported', status: 415, meaning: 'The body is not application/pkcs10.', remedy: 'Send `Content-Type: application/pkcs10`.' },
  'est.body-size': {
    code: 'malformed',
    status: 413,
    meaning: 'The body is larger than a request may be.',
    remedy: 'A request for a P-256 key takes about 300 bytes.',
  },
  'est.base64': { code: 'malformed', meaning: 'The body is not base64 (RFC 8951 §3).', remedy: 'Base64 of the DER, with or without line breaks.' },
  'est.busy': { code: 'unavailable', meaning: 'Too many enrolments at once.', remedy: 'Ask again a little later.' },
  'est.rate': {
    code: 'rate-limited',
    meaning: 'The device has had ten certificates within the hour.',
    remedy: 'Renew a certificate when half of its life is over, once; a fault on the device asks again and again.',
  },
  'est.no-credentials': {
    code: 'unauthenticated',
    meaning: 'Neither a token nor a client certificate.',
    remedy: 'HTTP Basic with device id and token, or the factory certificate by TLS.',
  },
  'est.two-credentials': { code: 'forbidden', meaning: 'A token and a client certificate in one request.', remedy: 'Bring one of both.' },
  'est.authorization': {
    code: 'unauthenticated',
    meaning: 'The Authorization header is not Basic with a token.',
    remedy: 'User: device id or serial; password: the token (`fkt1-…`).',
  },
  'est.token': { code: 'unauthenticated', meaning: 'No such device, no such token, or another secret.', remedy: 'Create a token for this device.' },
  'est.agent-device': {
    code: 'forbidden',
    meaning: 'The device has an agent with keys of its own: a request over EST would replace its identity by one that no keys can be wrapped to.',
    remedy: 'Its agent enrols and renews over MQTT.',
  },
  'est.quarantined': { code: 'forbidden', meaning: 'The device is quarantined.', remedy: 'Settle what it is quarantined for.' },
  'est.subject': {
    code: 'forbidden',
    meaning: 'The request names another subject than the device.',
    remedy: 'One common name: the device id (or, the first time, its serial); or the subject of the certificate that is renewed.',
  },
  'est.alt-names': {
    code: 'forbidden',
    meaning: 'The request asks for other alternative names than the certificate has that is renewed, and than the profile gives.',
    remedy: 'Ask for those of the certificate that is renewed.',
  },
  'est.no-certificate': {
    code: 'unauthenticated',
    meaning: 'Re-enrolment without a client certificate.',
    remedy: 'Connect with the certificate that is to be renewed.',
  },
} as const satisfies Readonly<Record<string, EstReason>>

export type EstReasonCode = keyof typeof estReasons

/** Throws the Problem of a reason. */
export const refuseEst = (reason: EstReasonCode, detail?: string, retryAfterSeconds?: number): never => {
  const { code, meaning } = estReasons[reason]
  const after = retryAfterSeconds ?? (code === 'unavailable' ? 5 : undefined)
  throw new Problem(code, detail ?? meaning, { reason, ...(after === undefined ? {} : { retryAfterSeconds: after }) })
}

/** HTTP status of a reason that has one of its own. */
export const estStatus = (reason: string | undefined): number | undefined => {
  if (reason === undefined || !Object.hasOwn(estReasons, reason)) return undefined
  return (estReasons as Readonly<Record<string, EstReason>>)[reason]?.status
}
